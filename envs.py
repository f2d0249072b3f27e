"""Pinpad tasks: visit coloured cells in a hidden order, one reward at the very end.

This file holds the tasks of the paper (arXiv 2512.20605, App. A): rules, task tables and experts of the grid, then of
the ant. Everything is written once, for a batch of episodes, in numpy (`GridBatch`, `AntBatch`); the Gymnasium
environments `InternalRL/GridPinpad-v0` and `InternalRL/AntPinpad-v0` are their B=1 views. The grid also has the
Bayes-optimal predictor of its expert.

    import gymnasium, envs
    env = gymnasium.make("InternalRL/GridPinpad-v0")           # the paper's 7x7 post-training task
    env = gymnasium.make("InternalRL/GridPinpad-v0", size=5, colours=4, walls=2, task=(0, 2, 1))
    env = gymnasium.make("InternalRL/AntPinpad-v0")            # the paper's ant, post-training task

Conventions: a cell is one number, row * size + column, row 0 on top. Actions: 0 up, 1 down, 2 left, 3 right.
B episodes, T steps, G the grid's size, O colours, W walls, L visits in the longest task.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right
FAR = 127  # "no path" in the int8 distance fields


# ----------------------------------------------------------------------------------------------------
# Task sets (paper: App. A, Tables A1 and A2)
# ----------------------------------------------------------------------------------------------------


def parse_tasks(text: str) -> tuple[tuple[int, ...], ...]:
    """'0-1-4-5 2-3-0-1' -> ((0, 1, 4, 5), (2, 3, 0, 1))."""
    return tuple(tuple(int(colour) for colour in task.split("-")) for task in text.split())


@dataclass(frozen=True)
class TaskSet:
    """The sizes and tasks of one pinpad world. A task is the sequence of colours to visit, in order."""

    size: int  # G: the grid has G x G cells
    colours: int  # O
    walls: int  # W
    limit: int  # T: an episode that is not solved after this many steps ends with reward 0
    subgoals: tuple[tuple[int, ...], ...]  # the colours of each subgoal ("abstract action")
    pretrain: tuple[tuple[int, ...], ...]  # tasks of the unlabelled expert trajectories
    post: tuple[int, ...]  # the task of reinforcement learning
    ant: bool = False  # an ant on a plane of cells instead of an agent on a grid

    def __post_init__(self):
        check_sizes(self.size, self.colours, self.walls, self.limit)
        for task in (*self.pretrain, self.post):
            check_task(task, self.colours)

    @property
    def objects(self) -> int:
        """Things that lie on the grid: O colours, W walls and the agent."""
        return self.colours + self.walls + 1

    @property
    def post_subgoals(self) -> int:
        """Subgoals in the post-training task."""
        return len(self.post) // len(self.subgoals[0])

    @property
    def counting_success(self) -> float:
        """Success of choosing among the subgoals at random: (1 / subgoals) ** (subgoals in the task)."""
        return len(self.subgoals) ** -float(self.post_subgoals)

    def subgoal_of_colour(self) -> np.ndarray:
        """Index of the subgoal each colour belongs to, (O,)."""
        index = np.full(self.colours, -1)
        for i, subgoal in enumerate(self.subgoals):
            index[list(subgoal)] = i
        return index

    def transitions(self, task) -> set[tuple[int, int]]:
        """The pairs (subgoal a, next subgoal b) of a task."""
        names = self.subgoal_of_colour()[list(task)][:: len(self.subgoals[0])]
        return {(int(a), int(b)) for a, b in zip(names[:-1], names[1:])}


def check_sizes(size: int, colours: int, walls: int, limit: int) -> None:
    """Raise ValueError, naming the argument, unless these sizes make a grid."""
    for name, value, least in (("size", size, 2), ("colours", colours, 1), ("walls", walls, 0), ("limit", limit, 1)):
        if value < least:
            raise ValueError(f"{name}={value} is too small: it must be at least {least}")
    if colours + walls + 1 > size * size:
        raise ValueError(
            f"colours={colours} and walls={walls} and the agent do not fit in size={size} ({size * size} cells)"
        )


def check_task(task, colours: int) -> None:
    """Raise ValueError unless `task` is a sequence of colours 0..colours-1 without immediate repetition."""
    if not task or any(not 0 <= colour < colours for colour in task):
        raise ValueError(f"task={tuple(task)} must be a non-empty sequence of colours 0..{colours - 1}")
    if any(a == b for a, b in zip(task[:-1], task[1:])):
        raise ValueError(f"task={tuple(task)} repeats a colour at once: a visit needs a move from another cell")


PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
TABLE_A1 = parse_tasks(
    "0-1-4-5-0-1 0-1-4-5-2-3 0-1-6-7-2-3 2-3-0-1-4-5 2-3-6-7-2-3 2-3-6-7-4-5 4-5-0-1-4-5 4-5-0-1-6-7 "
    "4-5-2-3-6-7 6-7-2-3-0-1 6-7-2-3-6-7 6-7-4-5-0-1 0-1-6-7-4-5 2-3-0-1-6-7 4-5-2-3-0-1 6-7-4-5-2-3"
)
TABLE_A2 = parse_tasks(
    "0-3-2 1-0-3 2-1-0 3-2-1 0-2-0 0-2-1 0-3-1 1-0-2 1-3-1 1-3-2 2-0-2 2-0-3 2-1-3 3-1-0 3-1-3 3-2-0"
)
TASK_SETS = {
    # The paper's grid (App. A, Table A1). No subgoal transition of the post-training task is in Table A1.
    "paper": TaskSet(7, 8, 4, 100, PAIRS, TABLE_A1, (0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3)),
    # A small grid of the same kind: the paper's ant tasks (Table A2), single colours as subgoals.
    "small": TaskSet(5, 4, 1, 100, ((0,), (1,), (2,), (3,)), TABLE_A2, (0, 1, 2, 3, 0, 1)),
    # The paper's ant (App. A, Table A2). No subgoal transition of the post-training task is in Table A2.
    "ant": TaskSet(4, 4, 1, 500, ((0,), (1,), (2,), (3,)), TABLE_A2, (0, 1, 2, 3), ant=True),
}
ANT = TASK_SETS["ant"]


# ----------------------------------------------------------------------------------------------------
# Geometry tables, built once per grid size
# ----------------------------------------------------------------------------------------------------


def neighbour_table(size: int) -> np.ndarray:
    """Cell reached by each action on an empty grid, (G*G, 4); a move out of the grid stays."""
    cells = np.arange(size * size)
    row, column = np.divmod(cells, size)
    table = [np.clip(row + dr, 0, size - 1) * size + np.clip(column + dc, 0, size - 1) for dr, dc in MOVES]
    return np.stack(table, axis=1)


def offset_table(size: int) -> np.ndarray:
    """Index in 0..(2G-1)^2-1 of the offset (object - agent), as table[object cell, agent cell]."""
    row, column = np.divmod(np.arange(size * size), size)
    dr = row[:, None] - row[None, :] + size - 1
    dc = column[:, None] - column[None, :] + size - 1
    return dr * (2 * size - 1) + dc


def mirror_table(size: int) -> np.ndarray:
    """The 8 symmetries of the square as maps of cells, (8, G*G); symmetry 0 is the identity."""
    grid = np.arange(size * size).reshape(size, size)
    turned = [np.rot90(view, k) for view in (grid, grid.T) for k in range(4)]
    return np.stack([view.reshape(-1) for view in turned])


# ----------------------------------------------------------------------------------------------------
# The batched core: layouts and dynamics
# ----------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where everything lies at the start of B episodes (cells)."""

    colours: np.ndarray  # (B, O)
    walls: np.ndarray  # (B, W)
    agent: np.ndarray  # (B,)

    def take(self, index) -> Layout:
        return Layout(self.colours[index], self.walls[index], self.agent[index])


def sample_layouts(world: TaskSet, count: int, rng: np.random.Generator) -> Layout:
    """`count` layouts: colours, walls and agent on distinct cells, uniformly."""
    keys = rng.random((count, world.size**2), dtype=np.float32)
    cells = np.argpartition(keys, world.objects - 1, axis=1)[:, : world.objects]
    cells = rng.permuted(cells, axis=1)  # argpartition's own order is not uniform
    return Layout(cells[:, : world.colours], cells[:, world.colours : -1], cells[:, -1])


def pad_tasks(tasks) -> tuple[np.ndarray, np.ndarray]:
    """Tasks of unequal length -> colours (B, L + 1) padded with -1, lengths (B,)."""
    lengths = np.array([len(task) for task in tasks])
    padded = np.full((len(tasks), lengths.max() + 1), -1)
    for row, task in zip(padded, tasks):
        row[: len(task)] = task
    return padded, lengths


class GridBatch:
    """B episodes of grid pinpad that step together. Finished ones are dropped with `select`.

    Arguments: world, the sizes and the limit; layout, B start layouts; tasks, a list of B colour sequences or
    the result of `pad_tasks`; roam, whether visits neither count nor end anything (to see where a policy goes).
    """

    def __init__(self, world: TaskSet, layout: Layout, tasks, roam: bool = False):
        self.world, self.roam = world, roam
        self.colours, self.walls = layout.colours, layout.walls
        self.agent = layout.agent.copy()
        self.tasks, self.lengths = tasks if isinstance(tasks, tuple) else pad_tasks(tasks)
        B = len(self.agent)
        self.stage = np.zeros(B, dtype=np.int64)  # visits done so far
        self.time = np.zeros(B, dtype=np.int64)
        # What lies on each cell: colour 0..O-1, wall O..O+W-1, nothing -1.
        self.content = np.full((B, world.size**2), -1, dtype=np.int64)
        things = np.concatenate([self.colours, self.walls], axis=1)
        np.put_along_axis(self.content, things, np.arange(things.shape[1])[None], axis=1)
        self._rows = np.arange(B)
        self._neighbour = neighbour_table(world.size)

    def __len__(self) -> int:
        return len(self.agent)

    def step(self, actions: np.ndarray):
        """actions (B,) -> visited colour or -1 (B,), reward (B,), done (B,)."""
        target = self._neighbour[self.agent, actions]
        on_target = self.content[self._rows, target]
        moved = (target != self.agent) & (on_target < self.world.colours)  # neither the border nor a wall
        self.agent = np.where(moved, target, self.agent)
        visited = np.where(moved, on_target, -1)  # a bump is no visit
        self.time += 1
        if self.roam:
            return visited, np.zeros(len(self), dtype=np.float32), self.time >= self.world.limit
        correct = (visited >= 0) & (visited == self.goal())
        self.stage += correct
        solved = self.stage == self.lengths
        wrong = (visited >= 0) & ~correct
        done = solved | wrong | (self.time >= self.world.limit)
        return visited, solved.astype(np.float32), done

    def goal(self) -> np.ndarray:
        """The colour to visit next, -1 once solved, (B,). Hidden from the agent."""
        return self.tasks[self._rows, self.stage]

    def subgoal(self) -> np.ndarray:
        """Index of the current subgoal, -1 once solved, (B,). For evaluation only."""
        index = np.append(self.world.subgoal_of_colour(), -1)
        return index[self.goal()]

    def place(self, index: np.ndarray, cell: np.ndarray, rng) -> None:
        """Put the agents of the episodes `index` on these cells, which is no visit."""
        self.agent[index] = cell

    def select(self, index: np.ndarray) -> None:
        """Keep only the episodes of `index` (a mask or indices), so that no work is done for the dead."""
        for name in ("colours", "walls", "agent", "tasks", "lengths", "stage", "time", "content"):
            setattr(self, name, getattr(self, name)[index])
        self._rows = np.arange(len(self.agent))

    def inputs(self) -> np.ndarray:
        """Cell of every colour, every wall and the agent, (B, O + W + 1): where `observe` has its ones."""
        return np.concatenate([self.colours, self.walls, self.agent[:, None]], axis=1)

    def observe(self) -> np.ndarray:
        """The paper's observation: per cell a one-hot (O colours, W walls, agent), (B, G*G*(O+W+1)) float32."""
        obs = np.zeros((len(self), self.world.size**2, self.world.objects), dtype=np.float32)
        obs[self._rows[:, None], self.inputs(), np.arange(self.world.objects)] = 1
        return obs.reshape(len(self), -1)


# ----------------------------------------------------------------------------------------------------
# The expert (dynamic programming) and its trajectories
# ----------------------------------------------------------------------------------------------------


def distance_fields(world: TaskSet, layout: Layout) -> np.ndarray:
    """Steps from every cell to every colour, walls and the *other* colours being obstacles.

    Returns (B, O, G*G) int8, FAR where there is no path. Relaxation: d = min(d, 1 + min over neighbours),
    all fields at once, with a border of FAR around the grid and the batch last, where numpy is fastest.
    """
    B, G, O = len(layout.agent), world.size, world.colours
    blocked = np.zeros((G * G, O, B), dtype=bool)
    rows = np.arange(B)
    for wall in layout.walls.T:
        blocked[wall, :, rows] = True
    for colour in range(O):
        cell = layout.colours[:, colour]
        goal = np.arange(O) == colour
        blocked[cell, :, rows] = ~goal
    field = np.full((G + 2, G + 2, O, B), FAR, dtype=np.int8)
    inner = field[1:-1, 1:-1]
    grid = inner.reshape(G * G, O, B)  # a copy: fill it, then write it back
    for colour in range(O):
        grid[layout.colours[:, colour], colour, rows] = 0
    inner[...] = grid.reshape(G, G, O, B)
    wall_value = np.where(blocked, FAR, 0).astype(np.int8).reshape(G, G, O, B)
    while True:
        best = np.minimum(field[:-2, 1:-1], field[2:, 1:-1])
        np.minimum(best, field[1:-1, :-2], out=best)
        np.minimum(best, field[1:-1, 2:], out=best)
        best += best < FAR
        np.minimum(best, inner, out=best)
        np.maximum(best, wall_value, out=best)
        if np.array_equal(best, inner):
            return np.ascontiguousarray(inner.transpose(3, 2, 0, 1)).reshape(B, O, G * G)
        inner[...] = best


def shortest_actions(field: np.ndarray, rows, target, agent, neighbour: np.ndarray) -> np.ndarray:
    """Which actions lie on a shortest path: a mask (B, 4). field (., O, G*G); rows, target, agent (B,)."""
    reach = field[rows[:, None], target[:, None], neighbour[agent]]  # (B, 4)
    return (reach == reach.min(axis=1, keepdims=True)) & (reach < FAR) & (neighbour[agent] != agent[:, None])


def solvable(field: np.ndarray, layout: Layout, tasks: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether every leg of the task has a path that avoids walls and wrong colours, (B,)."""
    rows = np.arange(len(tasks))
    neighbour = neighbour_table(round(field.shape[-1] ** 0.5))
    ok = np.ones(len(tasks), dtype=bool)
    start = layout.agent
    for i in range(tasks.shape[1] - 1):
        active = lengths > i
        target = np.where(active, tasks[:, i], 0)
        # The start may itself be a coloured cell, an obstacle of this field: look at the cells around it.
        reach = field[rows[:, None], target[:, None], neighbour[start]]
        reach = np.where(neighbour[start] == start[:, None], FAR, reach)
        ok &= ~active | (reach.min(axis=1) < FAR)
        start = np.where(active, layout.colours[rows, target], start)
    return ok


class Episodes(NamedTuple):
    """N expert trajectories, padded to T steps."""

    colours: np.ndarray  # (N, O) cells
    walls: np.ndarray  # (N, W) cells
    agent: np.ndarray  # (N, T + 1) cell of the agent before each action and after the last (then repeated)
    actions: np.ndarray  # (N, T)
    expert: np.ndarray  # (N, T, 4) the clean expert's action probabilities: uniform over shortest paths
    goal: np.ndarray  # (N, T) colour pursued, -1 in the padding; ground truth, for evaluation only
    mask: np.ndarray  # (N, T) True on real steps
    task: np.ndarray  # (N,) index into the list of tasks

    def lengths(self) -> np.ndarray:
        """Steps of each episode, (N,): also the place of its last observation in `inputs`."""
        return self.mask.sum(axis=1)

    def inputs(self) -> np.ndarray:
        """The observations, the last one included, as `GridBatch.inputs` gives them, (N, T + 1, O + W + 1)."""
        things = np.concatenate([self.colours, self.walls], axis=1)
        things = np.broadcast_to(things[:, None], (*self.agent.shape, things.shape[1]))
        return np.concatenate([things, self.agent[..., None]], axis=-1)

    @property
    def asked(self) -> np.ndarray:
        """What the expert saw when it chose `actions`, (N, T, O + W + 1)."""
        return self.inputs()[:, :-1]

    def take(self, index) -> Episodes:
        """The episodes of `index`, with the padding cut to the longest of them."""
        longest = int(self.mask[index].sum(axis=1).max())
        cut = {"agent": longest + 1, "actions": longest, "expert": longest, "goal": longest, "mask": longest}
        return Episodes(*(v[index][:, : cut.get(k)] if k in cut else v[index] for k, v in self._asdict().items()))


def solvable_layouts(world: TaskSet, tasks, count: int, rng: np.random.Generator):
    """`count` random solvable (layout, task) pairs, by rejection.

    Returns layout, task index (count,), distance fields, share of unsolvable draws. Given the layout, the task
    is then uniform over the tasks that can be solved on it, which is the prior of `bayes_predictor`.
    """
    padded, lengths = pad_tasks(tasks)
    parts, drawn, kept = [], 0, 0
    while kept < count:
        if drawn > 10_000 and not kept:
            raise ValueError(f"no solvable layout in {drawn} draws: fewer walls or colours, or a larger size")
        layout = sample_layouts(world, max(64, int(1.25 * (count - kept))), rng)
        index = rng.integers(len(tasks), size=len(layout.agent))
        field = distance_fields(world, layout)
        ok = np.flatnonzero(solvable(field, layout, padded[index], lengths[index]))
        drawn += len(index)
        kept += len(ok)
        parts.append((layout.take(ok), index[ok], field[ok]))
    layouts, indices, fields = zip(*parts)
    layout = Layout(*(np.concatenate(column)[:count] for column in zip(*layouts)))
    return layout, np.concatenate(indices)[:count], np.concatenate(fields)[:count], 1 - kept / drawn


def expert_episodes(
    world: TaskSet, tasks, count: int, rng: np.random.Generator, noise=0.0, displace=0.0, on_colour=0.0, chunk=1024
):
    """`count` successful expert trajectories on random solvable layouts -> Episodes, share of unsolvable draws.

    With probability `noise` a step takes a random action that ends nothing and closes no way (paper: eps). With
    probability `displace` a step is followed by a jump to a random cell (ours: it shows what to do from
    places the expert would not pass, and unlike `noise` leaves every action an expert's). With probability
    `on_colour` an episode starts on a random colour that is not its first goal (ours: every later subgoal starts
    on a colour, and where an episode starts must not tell where it goes). The recorded expert
    probabilities stay the clean expert's. Episodes over the time limit are drawn again. Worked on in chunks
    that fit the processor's cache.
    """
    parts, unsolvable, made = [], [], 0
    while made < count:
        part, share = _expert_chunk(world, tasks, min(chunk, count - made), rng, noise, displace, on_colour)
        parts.append(part)
        unsolvable.append(share)
        made += len(part.task)
    T = max(part.mask.shape[1] for part in parts)

    def join(name):
        arrays = [getattr(part, name) for part in parts]
        if name in ("agent", "actions", "expert", "goal", "mask"):
            more = [[(0, 0), (0, T - part.mask.shape[1])] + [(0, 0)] * (a.ndim - 2) for part, a in zip(parts, arrays)]
            options = {"goal": {"constant_values": -1}, "agent": {"mode": "edge"}}.get(name, {})
            arrays = [np.pad(a, pad, **options) for a, pad in zip(arrays, more)]
        return np.concatenate(arrays)

    return Episodes(*(join(name) for name in Episodes._fields)), float(np.mean(unsolvable))


def _expert_chunk(world, tasks, count, rng, noise, displace, on_colour):
    layout, task, field, share = solvable_layouts(world, tasks, count, rng)
    padded, lengths = pad_tasks(tasks)
    batch = GridBatch(world, layout, (padded[task], lengths[task]))
    neighbour = neighbour_table(world.size)
    moved = np.flatnonzero(rng.random(count) < on_colour)
    _displace(batch, field, np.arange(count), moved, _one_of(batch.colours[moved], rng), rng)
    record = {
        "agent": np.repeat(batch.agent[:, None], world.limit + 1, axis=1),
        "actions": np.zeros((count, world.limit), dtype=np.int64),
        "expert": np.zeros((count, world.limit, 4), dtype=np.float32),
        "goal": np.full((count, world.limit), -1, dtype=np.int64),
        "mask": np.zeros((count, world.limit), dtype=bool),
    }
    alive, success = np.arange(count), np.zeros(count, dtype=bool)
    for t in range(world.limit):
        goal = batch.goal()
        best = shortest_actions(field, alive, goal, batch.agent, neighbour)
        action = _choose(best, rng)
        if noise > 0:
            free = _harmless_actions(batch, field, alive, goal, neighbour)
            action = np.where(rng.random(len(action)) < noise, _choose(free, rng), action)
        record["actions"][alive, t] = action
        record["expert"][alive, t] = best / best.sum(axis=1, keepdims=True)
        record["goal"][alive, t] = goal
        record["mask"][alive, t] = True
        _, reward, done = batch.step(action)
        if displace > 0:
            moved = np.flatnonzero(~done & (rng.random(len(done)) < displace))
            _displace(batch, field, alive, moved, rng.integers(world.size**2, size=len(moved)), rng)
        record["agent"][alive, t + 1 :] = batch.agent[:, None]
        success[alive[reward > 0]] = True
        alive = alive[~done]
        batch.select(~done)
        if not len(alive):
            break
    record = {name: value[success][:, : t + 1 + (name == "agent")] for name, value in record.items()}
    return Episodes(layout.colours[success], layout.walls[success], **record, task=task[success]), share


def _choose(allowed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One allowed action per row, uniformly; allowed (B, 4) has a True in every row."""
    return np.argmax(allowed * (1 + rng.random(allowed.shape, dtype=np.float32)), axis=1)


def _harmless_actions(batch: GridBatch, field, rows, goal, neighbour) -> np.ndarray:
    """Actions that neither visit a wrong colour nor lead where the goal cannot be reached, (B, 4)."""
    target = neighbour[batch.agent]  # (B, 4)
    content = batch.content[batch._rows[:, None], target]
    bump = (target == batch.agent[:, None]) | (content >= batch.world.colours)
    return bump | (field[rows[:, None], goal[:, None], target] < FAR)


def _one_of(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One value of each row of (B, K), uniformly."""
    return values[np.arange(len(values)), rng.integers(values.shape[1], size=len(values))]


def _displace(batch, field, rows, chosen, cell, rng) -> None:
    """Put the agent of each `chosen` episode on its `cell`, where that is no wall, not the goal and not cut off.

    A cell of another colour will do: being put there is no visit.
    """
    goal, content = batch.goal()[chosen], batch.content[chosen, cell]
    reach = field[rows[chosen, None], goal[:, None], neighbour_table(batch.world.size)[cell]].min(axis=1)
    allowed = (content < batch.world.colours) & (content != goal) & (reach < FAR)
    batch.place(chosen[allowed], cell[allowed], rng)


def bayes_predictor(world: TaskSet, tasks, episodes: Episodes) -> np.ndarray:
    """The best possible next-action probabilities given the observations so far, (N, T, 4).

    The task is hidden; p(task | o_1:t) is proportional to p(o_1:t | task), the clean expert's likelihood of the
    moves so far, over the tasks that can be solved on this layout. Its loss on held-out episodes is the floor of
    every base model. For episodes without noise.
    """
    padded, lengths = pad_tasks(tasks)
    N, T = episodes.mask.shape
    K = len(tasks)
    layout = Layout(episodes.colours, episodes.walls, episodes.agent[:, 0])
    field = distance_fields(world, layout)
    neighbour = neighbour_table(world.size)
    posterior = np.stack(
        [solvable(field, layout, np.tile(padded[k], (N, 1)), np.full(N, lengths[k])) for k in range(K)], axis=1
    ).astype(float)
    rows = np.repeat(np.arange(N), K)
    stage = np.zeros(N, dtype=np.int64)
    result = np.zeros((N, T, 4), dtype=np.float32)
    for t in range(T):
        live = episodes.mask[:, t]
        goals = padded[:, np.minimum(stage, padded.shape[1] - 1)].T  # (N, K); -1 where the task is over
        target = np.maximum(goals, 0).reshape(-1)
        best = shortest_actions(field, rows, target, np.repeat(episodes.agent[:, t], K), neighbour)
        chance = best / np.maximum(best.sum(axis=1, keepdims=True), 1)
        chance = chance.reshape(N, K, 4) * (goals >= 0)[..., None]
        posterior *= goals >= 0  # the episode goes on, so a task that would be over is not the one
        posterior /= np.maximum(posterior.sum(axis=1, keepdims=True), 1e-30)
        result[:, t] = (posterior[..., None] * chance).sum(axis=1) * live[:, None]
        taken = chance[np.arange(N), :, episodes.actions[:, t]]
        posterior = np.where(live[:, None], posterior * taken, posterior)
        if t + 1 < T:  # a visit also tells which tasks are still possible
            visit = live & episodes.mask[:, t + 1] & (episodes.goal[:, t + 1] != episodes.goal[:, t])
            posterior = np.where(visit[:, None], posterior * (goals == episodes.goal[:, t][:, None]), posterior)
            stage += visit
    return result


# ----------------------------------------------------------------------------------------------------
# The Gymnasium environment
# ----------------------------------------------------------------------------------------------------

COLOURS = np.array(
    [
        (230, 60, 60), (60, 110, 230), (60, 170, 75), (240, 200, 40),
        (150, 70, 190), (240, 140, 40), (70, 200, 220), (240, 130, 190),
    ],
    dtype=np.uint8,
)  # fmt: skip


class GridPinpad(gym.Env):
    """Grid pinpad: visit the colours of a hidden task in order.

    ## Description
    A size x size grid with `colours` coloured cells and `walls` walls at random places. A coloured cell is
    visited when the agent moves onto it from another cell. Defaults: the paper's 7x7 post-training task.

    ## Action
    Discrete(4): 0 up, 1 down, 2 left, 3 right. A move into a wall or out of the grid does nothing.

    ## Observation
    Box of 0s and 1s, (size * size * (colours + walls + 1),), row-major over cells, then channels:

    | channel | meaning |
    |---|---|
    | 0 .. colours - 1 | this colour lies on the cell |
    | colours .. colours + walls - 1 | this wall stands on the cell |
    | colours + walls | the agent is on the cell |

    Neither the task nor the history of visits is in it.

    ## Reward
    1 when the last colour of the task is visited in order, else 0.

    ## Start
    Colours, walls and agent on distinct cells, uniformly. Layouts are not checked for solvability unless
    `reset(options={"solvable": True})`.

    ## End
    Terminates when the task is solved, when a wrong colour is visited, and after `limit` steps: the limit is
    part of the task. Never truncates. `info["subgoal"]` is the true subgoal: for evaluation only.

    ## Arguments
    size, colours, walls, limit, task (a sequence of colours), subgoals (the colours of each subgoal; single
    colours where the default pairs do not fit), render_mode ("ansi" or "rgb_array").
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(self, size=7, colours=8, walls=4, limit=100, task=None, subgoals=None, render_mode=None):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r} must be None, 'ansi' or 'rgb_array'")
        task = TASK_SETS["paper"].post if task is None else tuple(task)
        if subgoals is None:
            subgoals = PAIRS if colours == 8 else tuple((c,) for c in range(colours))
        self.world = TaskSet(size, colours, walls, limit, tuple(subgoals), (task,), task)
        self.render_mode = render_mode
        self.action_space = gym.spaces.Discrete(4)
        shape = (size * size * self.world.objects,)
        self.observation_space = gym.spaces.Box(0.0, 1.0, shape, np.float32)
        self._batch: GridBatch | None = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if (options or {}).get("solvable"):
            layout = solvable_layouts(self.world, [self.world.post], 1, self.np_random)[0]
        else:
            layout = sample_layouts(self.world, 1, self.np_random)
        self._batch = GridBatch(self.world, layout, [self.world.post])
        return self._batch.observe()[0], self._info()

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"action={action!r} must be an integer 0..3")
        if self._batch is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        _, reward, done = self._batch.step(np.array([action]))
        return self._batch.observe()[0], float(reward[0]), bool(done[0]), False, self._info()

    def render(self):
        if self._batch is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self.render_mode == "ansi":
            return grid_text(self.world, self._batch.content[0], int(self._batch.agent[0]))
        if self.render_mode == "rgb_array":
            return grid_picture(self.world, self._batch.content[0], int(self._batch.agent[0]))
        return None

    def _info(self) -> dict:
        return {"subgoal": int(self._batch.subgoal()[0]), "visits": int(self._batch.stage[0])}


def grid_text(world: TaskSet, content: np.ndarray, agent: int) -> str:
    """One character a cell: digits are colours, # walls, @ the agent (* when it stands on a colour)."""
    marks = np.array([*(str(c % 10) for c in range(world.colours)), *"#" * world.walls, "."])[content]
    marks[agent] = "*" if 0 <= content[agent] < world.colours else "@"
    return "\n".join(" ".join(row) for row in marks.reshape(world.size, world.size)) + "\n"


def cell_picture(world: TaskSet, content: np.ndarray, scale: int) -> np.ndarray:
    """The colours and dark walls as an RGB picture, (G*scale, G*scale, 3) uint8."""
    palette = np.concatenate([
        COLOURS[np.arange(world.colours) % len(COLOURS)],
        np.full((world.walls, 3), 70, dtype=np.uint8),
        np.full((1, 3), 245, dtype=np.uint8),
    ])  # fmt: skip
    return palette[content].reshape(world.size, world.size, 3).repeat(scale, axis=0).repeat(scale, axis=1)


def grid_picture(world: TaskSet, content: np.ndarray, agent: int, scale: int = 24) -> np.ndarray:
    """An RGB picture (G*scale, G*scale, 3) uint8: colours, dark walls, the agent a black square."""
    picture = cell_picture(world, content, scale)
    row, column = divmod(agent, world.size)
    inset = scale // 4
    picture[row * scale + inset : (row + 1) * scale - inset, column * scale + inset : (column + 1) * scale - inset] = 0
    return picture


gym.register(id="InternalRL/GridPinpad-v0", entry_point=GridPinpad, nondeterministic=False)


# ----------------------------------------------------------------------------------------------------
# Ant pinpad: physics and rules, written once, for a batch of episodes
# ----------------------------------------------------------------------------------------------------
#
# The world is G x G cells of ANT_CELL metres around the origin, x to the right, y up: row 0 has the largest y.
# A state is MuJoCo's: time, position (x y z, quaternion w x y z, hip and ankle of legs 1 to 4), velocity (the same
# but for the quaternion: 3 turning rates). Torques are in MuJoCo's order, leg 4 first: hip_4, ankle_4, hip_1, ...

ANT_CELL = 1.25  # metres; ours: it makes a colour about as many steps as in the paper's Fig. 6
ANT_SUBSTEPS = 5  # of 0.01 s; ours, Gymnasium's ant
ANT_HEIGHT = (0.2, 1.0)  # of the torso; outside, the episode ends
ANT_LARGEST = 200.0  # m, rad, m/s or rad/s: beyond, the simulation has diverged (random torques reach about 20)
XY, HEIGHT, QUATERNION, JOINTS, JOINT_RATES = slice(1, 3), 3, slice(4, 8), slice(8, 16), slice(22, 30)  # in the state
STANDING = (0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1)  # ant.xml's init_qpos; all joints at 0: 86 % fall


@functools.cache
def ant_physics(threads: int):
    """The model, a scratch MjData per thread and their pool, built once per process."""
    import mujoco  # here, because the grid does not need it
    import mujoco.rollout

    model = mujoco.MjModel.from_xml_path(str(Path(gym.__file__).parent / "envs/mujoco/assets/ant.xml"))
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST  # 4 times the speed of the file's RK4
    # MuJoCo would silently put an ant that diverges back to the origin; we want to see it.
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
    pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
    return model, [mujoco.MjData(model) for _ in range(threads)], pool


def ant_simulate(state: np.ndarray, torques: np.ndarray, threads: int = 1) -> np.ndarray:
    """One control step: state (B, 30), torques (B, 8), clipped to [-1, 1] -> state (B, 30)."""
    model, scratch, pool = ant_physics(threads)
    states, _ = pool.rollout(model, scratch, state, torques[:, None].astype(float), nstep=ANT_SUBSTEPS)
    return states[:, -1]


def cell_centres(size: int) -> np.ndarray:
    """x and y of the centre of every cell, (G*G, 2)."""
    row, column = np.divmod(np.arange(size * size), size)
    return ANT_CELL * np.stack([column - (size - 1) / 2, (size - 1) / 2 - row], axis=1)


def symlog(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.log1p(np.abs(x))


def symexp(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.expm1(np.abs(x))


def ant_slices(world: TaskSet) -> dict[str, slice]:
    """Where each part of the observation lies; `AntPinpad` says what the parts are."""
    things = 2 * (world.colours + world.walls)
    sizes = {"height": 1, "orientation": 4, "joints": 8, "velocity": 14, "xy": 2, "things": things, "local": 2}
    ends = np.cumsum([0, *sizes.values()]).tolist()
    return {name: slice(start, end) for name, start, end in zip(sizes, ends[:-1], ends[1:])}


@functools.cache
def _ant_turns(world: TaskSet):
    """What `turn_ant` does to all parts but the orientation: places (4, 4, F) and signs (4, 4, F)."""
    parts = ant_slices(world)
    place = np.tile(np.arange(parts["local"].stop), (4, 4, 1))
    sign = np.ones(place.shape, dtype=np.float32)
    velocity = parts["velocity"].start
    in_world = [velocity, *(parts[name].start for name in ("xy", "local"))]
    in_world += range(parts["things"].start, parts["things"].stop, 2)
    quarter = ([0, 1], [1, 1]), ([1, 0], [-1, 1]), ([0, 1], [-1, -1]), ([1, 0], [1, -1])  # of a vector (x, y)
    for turns, legs in np.ndindex(4, 4):
        for start, angle in [*((start, turns) for start in in_world), (velocity + 3, -legs)]:
            order, signs = quarter[angle % 4]
            place[turns, legs, start : start + 2] = start + np.array(order)
            sign[turns, legs, start : start + 2] = signs
        for start in (parts["joints"].start, velocity + 6):
            for leg in range(4):
                was = (leg + legs) % 4
                place[turns, legs, start + 2 * leg + np.arange(2)] = start + 2 * was + np.arange(2)
                sign[turns, legs, start + 2 * leg + 1] = ANKLE_SIGN[was] * ANKLE_SIGN[leg]
    return place, sign


def turn_ant(world: TaskSet, obs: np.ndarray, turns: np.ndarray, legs: np.ndarray) -> np.ndarray:
    """The same trajectories, obs (N, T, F), in a world turned by quarters to the left, `turns` (N,) of 0..3.

    The ant looks the same from four sides: `legs` (N,) of 0..3 renames its legs, so that its own frame turns too.
    Both are symmetries of the task, the physics and the expert (but for what it takes for its yaw when it tilts).
    """
    place, sign = (table[turns, legs][:, None] for table in _ant_turns(world))
    turned = np.take_along_axis(obs, np.broadcast_to(place, obs.shape), axis=2) * sign
    w, x, y, z = np.moveaxis(symexp(obs[..., ant_slices(world)["orientation"]]), -1, 0)
    # Turns about z, before and after: the halves w + iz and x + iy of the quaternion turn by half the angle.
    one = (w + 1j * z) * np.exp(1j * np.pi / 4 * (turns + legs))[:, None]
    two = (x + 1j * y) * np.exp(1j * np.pi / 4 * (turns - legs))[:, None]
    turned[..., ant_slices(world)["orientation"]] = symlog(np.stack([one.real, two.real, two.imag, one.imag], -1))
    return turned


def turn_torques(torques: np.ndarray, legs: np.ndarray) -> np.ndarray:
    """The torques (N, T, 8) of an ant whose legs were renamed by `turn_ant`; legs (N,)."""
    was = (np.arange(3, 7) + legs[:, None]) % 4  # MuJoCo's actuators start with leg 4
    by_leg = np.roll(torques.reshape(*torques.shape[:2], 4, 2), -1, axis=2)  # from leg 1 on
    turned = np.take_along_axis(by_leg, was[:, None, :, None], axis=2)
    turned[..., 1] *= (ANKLE_SIGN[was] * ANKLE_SIGN[[3, 0, 1, 2]])[:, None]
    return turned.reshape(torques.shape)


class AntBatch:
    """B episodes of ant pinpad that step together. Finished ones are dropped with `select`.

    Arguments as of `GridBatch`; rng draws the start poses: anywhere in the cell, any yaw, joint angles and rates
    within 0.1 of standing still. Starting on a colour is no visit, but `sample_layouts` starts on a free cell.
    An episode ends as on the grid, and when the torso enters a wall cell or is too low or too high; also when the
    simulation diverges or a torque is not finite, which `diverged` counts. `roam` keeps these last ends. What the
    paper leaves open: beyond the grid everything belongs to the nearest cell, so that the border ends nothing, as on
    the grid; nor does lying upside down, which the height does not show (see `upright`).
    threads: for the simulation; no result depends on it.
    """

    def __init__(self, world: TaskSet, layout: Layout, tasks, rng: np.random.Generator, roam=False, threads=1):
        self.world, self.roam, self.threads = world, roam, threads
        self.colours, self.walls = layout.colours, layout.walls
        self.tasks, self.lengths = tasks if isinstance(tasks, tuple) else pad_tasks(tasks)
        B = len(layout.agent)
        self.stage = np.zeros(B, dtype=np.int64)  # visits done so far
        self.time = np.zeros(B, dtype=np.int64)
        self.cell = layout.agent.copy()  # of the torso
        # What lies on each cell: colour 0..O-1, wall O..O+W-1, nothing -1.
        self.content = np.full((B, world.size**2), -1, dtype=np.int64)
        self._things = np.concatenate([self.colours, self.walls], axis=1)
        np.put_along_axis(self.content, self._things, np.arange(self._things.shape[1])[None], axis=1)
        self.diverged = 0  # episodes so far that ended because the simulation did
        self._rows = np.arange(B)
        self._centres = cell_centres(world.size)
        self._half = world.size * ANT_CELL / 2
        self.state = self._standing(self.cell)  # (B, 30)
        self.state[:, XY] += rng.uniform(-ANT_CELL / 2, ANT_CELL / 2, (B, 2))
        yaw = rng.uniform(-np.pi, np.pi, B)
        self.state[:, 4], self.state[:, 7] = np.cos(yaw / 2), np.sin(yaw / 2)
        self.state[:, JOINTS] += rng.uniform(-0.1, 0.1, (B, 8))
        self.state[:, JOINT_RATES] = rng.uniform(-0.1, 0.1, (B, 8))

    def __len__(self) -> int:
        return len(self.cell)

    def _standing(self, cell: np.ndarray) -> np.ndarray:
        """The state of standing still at the centre of these cells."""
        state = np.zeros((len(cell), 30))
        state[:, 1:16] = STANDING
        state[:, XY] = self._centres[cell]
        return state

    def step(self, actions: np.ndarray):
        """torques (B, 8), clipped to [-1, 1] -> visited colour or -1 (B,), reward (B,), done (B,)."""
        sane = np.isfinite(actions).all(axis=1)
        self.state = ant_simulate(self.state, np.where(sane[:, None], actions, 0), self.threads)
        sane &= (np.abs(self.state[:, 1:]) < ANT_LARGEST).all(axis=1)  # also False where it is not finite
        self.diverged += int((~sane).sum())
        self.state[~sane] = self._standing(self.cell[~sane])
        target = self._cell_of(self.state[:, XY])
        content = np.where(target != self.cell, self.content[self._rows, target], -1)
        self.cell = target
        visited = np.where(content < self.world.colours, content, -1)
        self.time += 1
        lowest, highest = ANT_HEIGHT
        fallen = (self.state[:, HEIGHT] < lowest) | (self.state[:, HEIGHT] > highest)
        failed = ~sane | fallen | (content >= self.world.colours)
        if self.roam:
            return visited, np.zeros(len(self), dtype=np.float32), failed | (self.time >= self.world.limit)
        correct = (visited >= 0) & (visited == self.goal()) & ~failed
        self.stage += correct
        solved = self.stage == self.lengths
        wrong = (visited >= 0) & ~correct
        done = solved | wrong | failed | (self.time >= self.world.limit)
        return visited, solved.astype(np.float32), done

    def _cell_of(self, xy: np.ndarray) -> np.ndarray:
        """The cell of a place, or the nearest one off the grid, (B, 2) -> (B,)."""
        column, row = np.clip((self._half + xy * (1, -1)) // ANT_CELL, 0, self.world.size - 1).astype(np.int64).T
        return row * self.world.size + column

    def upright(self) -> np.ndarray:
        """Whether the torso's own z axis points up, (B,). For evaluation only."""
        return (self.state[:, 5:7] ** 2).sum(axis=1) < 0.5  # x and y of the quaternion: z . up = 1 - 2 (x^2 + y^2)

    def goal(self) -> np.ndarray:
        """The colour to visit next, -1 once solved, (B,). Hidden from the agent."""
        return self.tasks[self._rows, self.stage]

    def subgoal(self) -> np.ndarray:
        """Index of the current subgoal, -1 once solved, (B,). For evaluation only."""
        index = np.append(self.world.subgoal_of_colour(), -1)
        return index[self.goal()]

    def place(self, index: np.ndarray, cell: np.ndarray, rng) -> None:
        """Put the ants of the episodes `index` anywhere in these cells, as they move: no visit, no other change."""
        self.state[index, XY] = self._centres[cell] + rng.uniform(-ANT_CELL / 2, ANT_CELL / 2, (len(index), 2))
        self.cell[index] = cell

    def select(self, index: np.ndarray) -> None:
        """Keep only the episodes of `index` (a mask or indices), so that no work is done for the dead."""
        for name in ("colours", "walls", "cell", "tasks", "lengths", "stage", "time", "content", "state", "_things"):
            setattr(self, name, getattr(self, name)[index])
        self._rows = np.arange(len(self.cell))

    def observe(self) -> np.ndarray:
        """The paper's observation, (B, 31 + 2 (O + W)) float32: the parts of `ant_slices`, in that order."""
        xy = self.state[:, XY]
        things = self._centres[self._things] - xy[:, None]  # (B, O + W, 2)
        local = xy - self._centres[self.cell]
        parts = [symlog(self.state[:, HEIGHT:]), xy / self._half, things.reshape(len(self), -1) / self._half]
        return np.concatenate([*parts, local / (ANT_CELL / 2)], axis=1).astype(np.float32)

    inputs = observe  # what the base model reads


# ----------------------------------------------------------------------------------------------------
# The ant's expert (scripted) and its trajectories
# ----------------------------------------------------------------------------------------------------

LEG_AZIMUTH = np.pi / 4 + np.pi / 2 * np.arange(4)  # of legs 1 to 4, seen from the torso
ANKLE_SIGN = np.array([1, -1, -1, 1])  # ant.xml bends these ankles to this side
DIAGONAL = np.array([1, -1, 1, -1])  # a trot: legs 1 and 3 against legs 2 and 4


def yaw_of(state: np.ndarray) -> np.ndarray:
    """Where the torso's x axis points, seen from above, (..., 30) -> (...)."""
    w, x, y, z = np.moveaxis(state[..., QUATERNION], -1, 0)
    return np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def trot(state: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """A clock-free trot: state (B, 30), direction of travel (B,) in radians -> torques (B, 8) in [-1, 1].

    The phase is read from the ankles: theta = atan2(-sum, -rate of the sum / w0) + delta over the alternating sum
    of their angles. Each leg swings along the direction and lifts in the other half of its turn:
    hip -> -A cos(theta) tangential, ankle -> 1 - L sin(theta) + B cos(theta) radial, by a PD controller.
    The numbers were searched for and have sharp edges (kp 1.6 instead of 1.1 halves the success).
    """
    A, B, L, kp, kd, delta, w0 = 0.20, 0.35, 0.24, 1.1, 0.135, 2.45, 15.0
    hip, ankle = state[:, JOINTS].reshape(-1, 4, 2).transpose(2, 0, 1)  # (B, 4), legs 1 to 4
    hip_rate, ankle_rate = state[:, JOINT_RATES].reshape(-1, 4, 2).transpose(2, 0, 1)
    ankle, ankle_rate = ankle * ANKLE_SIGN, ankle_rate * ANKLE_SIGN
    angle = LEG_AZIMUTH + (yaw_of(state) - direction)[:, None]
    radial, tangential = np.cos(angle), -np.sin(angle)
    theta = np.arctan2(-(ankle * DIAGONAL).sum(axis=1), -(ankle_rate * DIAGONAL).sum(axis=1) / w0) + delta
    c, s = DIAGONAL * np.cos(theta)[:, None], DIAGONAL * np.sin(theta)[:, None]
    hip_torque = kp * (-A * c * tangential - hip) - kd * hip_rate
    ankle_torque = ANKLE_SIGN * (kp * (1 - L * s + B * c * radial - ankle) - kd * ankle_rate)
    legs = np.stack([hip_torque, ankle_torque], axis=-1)[:, [3, 0, 1, 2]]  # MuJoCo's actuators start with leg 4
    return legs.reshape(-1, 8).clip(-1, 1)


LEFT_OF = [2, 3, 1, 0]  # the move a quarter turn to the left of each


def ant_routes(field: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The next cell on a shortest path from every cell to every colour, (B, O, G*G); field (B, O, G*G).

    Of several the one from which the others lie to the right, of opposite ones the one to the left of the goal: so
    the goal decides the way, whichever way the world is turned. Only opposite ones in line with it are left to chance,
    drawn once per episode. Where there is no way the next cell is the cell itself.
    """
    B, O, cells = field.shape
    size = round(cells**0.5)
    neighbour = neighbour_table(size)
    episode, colour, cell = (index.reshape(-1) for index in np.indices(field.shape))
    best = shortest_actions(field, episode, colour, cell, neighbour)
    leftmost = best & ~best[:, LEFT_OF]
    best = np.where(leftmost.any(axis=1, keepdims=True), leftmost, best)
    goal = field.argmin(axis=-1).reshape(-1).repeat(cells)
    ahead, step = (np.array(np.divmod(c, size)) for c in (goal, neighbour[cell].T))  # row and column
    ahead, step = ahead - np.divmod(cell, size), step - np.array(np.divmod(cell, size))[:, None]
    left = best & (ahead[0] * step[1] < ahead[1] * step[0]).T
    best = np.where(left.any(axis=1, keepdims=True), left, best)
    target = np.where(best.any(axis=1), neighbour[cell, _choose(best, rng)], cell)
    return target.reshape(B, O, cells)


def ant_direction(batch: AntBatch, route: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where the centre of the next cell lies, (B,) in radians. route (., O, G*G); rows (B,): each episode's route."""
    target = batch._centres[route[rows, batch.goal(), batch.cell]]
    dx, dy = (target - batch.state[:, XY]).T
    return np.arctan2(dy, dx)


def ant_expert(batch: AntBatch, route: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Torques (B, 8) of the expert; arguments as of `ant_direction`."""
    return trot(batch.state, ant_direction(batch, route, rows))


class AntEpisodes(NamedTuple):
    """N expert trajectories, padded to T steps."""

    obs: np.ndarray  # (N, T + 1, F) float32, the last one included; 0 in the padding
    actions: np.ndarray  # (N, T, 8) float32, the clean expert's torques; 0 in the padding
    goal: np.ndarray  # (N, T) colour pursued, -1 in the padding; ground truth, for evaluation only
    mask: np.ndarray  # (N, T) True on real steps
    task: np.ndarray  # (N,) index into the list of tasks
    colours: np.ndarray  # (N, O) cells
    walls: np.ndarray  # (N, W) cells
    asked: np.ndarray  # (N, T, F) what the expert saw when it gave `actions`: obs_1..T, or the ant put elsewhere

    def lengths(self) -> np.ndarray:
        """Steps of each episode, (N,): also the place of its last observation in `obs`."""
        return self.mask.sum(axis=1)

    def inputs(self) -> np.ndarray:
        """The observations, the last one included, (N, T + 1, F)."""
        return self.obs

    def xy(self, world: TaskSet) -> np.ndarray:
        """Where the ant was, in metres, (N, T + 1, 2)."""
        return self.obs[..., ant_slices(world)["xy"]] * np.float32(world.size * ANT_CELL / 2)

    def turned(self, world: TaskSet, turns: np.ndarray, legs: np.ndarray) -> AntEpisodes:
        """The same episodes as `turn_ant` sees them; what is no observation and no action stays as it was."""
        obs, asked = (turn_ant(world, part, turns, legs) for part in (self.obs, self.asked))
        return self._replace(obs=obs, asked=asked, actions=turn_torques(self.actions, legs))

    def take(self, index) -> AntEpisodes:
        """The episodes of `index`, with the padding cut to the longest of them."""
        longest = int(self.mask[index].sum(axis=1).max())
        cut = {"obs": longest + 1} | dict.fromkeys(("actions", "goal", "mask", "asked"), longest)
        return AntEpisodes(*(v[index, : cut[k]] if k in cut else v[index] for k, v in self._asdict().items()))


def ant_expert_episodes(
    world: TaskSet, tasks, count: int, rng: np.random.Generator,
    noise=0.0, displace=0.0, on_colour=0.0, steps=None, chunk=256, threads=1,
):  # fmt: skip
    """`count` successful trajectories on random solvable layouts -> AntEpisodes, share unsolvable, success rate.

    noise: standard deviation of Gaussian noise on the torques that are executed; the recorded torques are the clean
    expert's at the states this leads to. displace, on_colour: as of `expert_episodes`. steps: cut episodes there,
    finished or not; without it an episode that is not solved within the limit is a failure. Failures are dropped, but
    they count in the success rate. Worked on in chunks that are written into one block, so that nothing is held
    twice: about 0.1 MB an episode at limit 500.
    """
    width = ant_slices(world)["local"].stop  # of an observation
    obs = np.zeros((count, world.limit + 1, width), dtype=np.float32)
    data = AntEpisodes(
        obs=obs,
        actions=np.zeros((count, world.limit, 8), dtype=np.float32),
        goal=np.full((count, world.limit), -1, dtype=np.int64),
        mask=np.zeros((count, world.limit), dtype=bool),
        task=np.zeros(count, dtype=np.int64),
        colours=np.zeros((count, world.colours), dtype=np.int64),
        walls=np.zeros((count, world.walls), dtype=np.int64),
        asked=obs[:, :-1],
    )
    options = rng, noise, displace, on_colour, steps or world.limit, steps is not None, threads
    unsolvable, made, tried, succeeded = [], 0, 0, 0
    while made < count:
        if tried > 1000 and not made:
            raise ValueError(f"the expert failed in all of {tried} episodes: less noise, or a longer limit")
        trials = min(chunk, int(1.1 * (count - made)) + 4)  # a few more than needed: some will fail
        part, success, share = _ant_expert_chunk(world, tasks, trials, *options)
        kept = np.flatnonzero(success)[: count - made]
        for whole, some in zip(data, part):
            whole[made : made + len(kept), ...] = some[kept]
        unsolvable.append(share)
        made, tried, succeeded = made + len(kept), tried + len(success), succeeded + int(success.sum())
    return data.take(slice(None)), float(np.mean(unsolvable)), succeeded / tried


def _ant_expert_chunk(world, tasks, count, rng, noise, displace, on_colour, steps, unfinished, threads):
    layout, task, field, share = solvable_layouts(world, tasks, count, rng)
    padded, lengths = pad_tasks(tasks)
    batch = AntBatch(world, layout, (padded[task], lengths[task]), rng, threads=threads)
    route = ant_routes(field, rng)
    moved = np.flatnonzero(rng.random(count) < on_colour)
    _displace(batch, field, np.arange(count), moved, _one_of(batch.colours[moved], rng), rng)
    first = batch.observe()
    obs = np.zeros((count, world.limit + 1, first.shape[1]), dtype=np.float32)
    obs[:, 0] = first
    actions = np.zeros((count, world.limit, 8), dtype=np.float32)
    goal = np.full((count, world.limit), -1, dtype=np.int64)
    alive, success = np.arange(count), np.zeros(count, dtype=bool)
    for t in range(steps):
        torques = ant_expert(batch, route, alive)
        actions[alive, t], goal[alive, t] = torques, batch.goal()
        _, reward, done = batch.step(torques + noise * rng.standard_normal(torques.shape))
        if displace:
            moved = np.flatnonzero(~done & (rng.random(len(done)) < displace))
            _displace(batch, field, alive, moved, rng.integers(world.size**2, size=len(moved)), rng)
        obs[alive, t + 1] = batch.observe()
        success[alive[reward > 0]] = True
        alive = alive[~done]
        batch.select(~done)
        if not len(alive):
            break
    success[alive] = unfinished
    episodes = AntEpisodes(obs, actions, goal, goal >= 0, task, layout.colours, layout.walls, obs[:, :-1])
    return episodes, success, share


STRIDE = 40  # control steps between two steps of a spliced trajectory
STRIDE_LENGTH = 0.02 * STRIDE  # metres, +-50 %: at most to the next cell's centre and a little on


def ant_strides(count: int, rng: np.random.Generator, noise: float, threads: int = 1) -> np.ndarray:
    """Moments of walking ants for `ant_spliced_episodes`: states (count, 30), turned so that all walk along x.

    256 ants trot on an empty plane, with torque noise of this deviation, in a direction that drifts and every 20th
    step turns by a quarter or a half; every 4th step is kept, also those in which an ant has just begun to turn.
    Each ant starts anew after 200 steps on average, or when it has fallen.
    """
    layout = sample_layouts(ANT, 256, rng)

    def start() -> AntBatch:
        return AntBatch(ANT, layout, [ANT.post] * 256, rng)

    batch, kept, made, t = start(), [], 0, 0
    direction = rng.uniform(-np.pi, np.pi, 256)
    while made < count:
        turns = rng.choice([np.pi / 2, -np.pi / 2, np.pi], 256) * (rng.random(256) < 1 / 20)
        direction = direction + turns + 0.03 * rng.standard_normal(256)
        torques = trot(batch.state, direction) + noise * rng.standard_normal((256, 8))
        batch.state = ant_simulate(batch.state, torques, threads)
        height = batch.state[:, HEIGHT]
        fallen = (height < ANT_HEIGHT[0]) | (height > ANT_HEIGHT[1]) | ~batch.upright()
        anew = fallen | (rng.random(256) < 1 / 200)
        if anew.any():
            batch.state[anew] = start().state[anew]
        t += 1
        if t % 4 == 0:
            kept.append(rotate_ant(batch.state[~anew], -direction[~anew]))
            made += len(kept[-1])
    return np.concatenate(kept)[:count]


def rotate_ant(state: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """The body of states (B, 30) turned to the left by angles (B,): heading and velocity, but not the place."""
    turned = state.copy()
    velocity = (state[:, 16] + 1j * state[:, 17]) * np.exp(1j * angle)  # of the torso; its turning rates are its own
    turned[:, 16], turned[:, 17] = velocity.real, velocity.imag
    half = np.exp(0.5j * angle)
    one, two = (state[:, 4] + 1j * state[:, 7]) * half, (state[:, 5] + 1j * state[:, 6]) * half
    turned[:, 4], turned[:, 7], turned[:, 5], turned[:, 6] = one.real, one.imag, two.real, two.imag
    return turned


def ant_spliced_episodes(
    world: TaskSet, tasks, count: int, steps: int, strides: np.ndarray, rng,
    displace=0.0, on_colour=0.0, elsewhere=0.0, short=0.0, pause=0.0, whole=False,
) -> AntEpisodes:  # fmt: skip
    """`count` trajectories in time-lapse, without simulation: at most `steps` decisions, `STRIDE` steps apart.

    Between two decisions the ant moves a stride's length on its way; how its body is moving then is one of `strides`
    (of `ant_strides`), turned anyhow. The recorded torques are the expert's for the place and the body. So the body
    tells nothing of where to go: who clones a simulated trajectory learns from the velocity to go on as before, and
    has no use for the goal. With chance `displace` the ant is then put somewhere else.
    on_colour: share of episodes that start on a colour. elsewhere: share of the actions for which the expert is asked
    as if the ant stood in another cell, on its way to the same goal (`asked`); the trajectory does not notice.
    short: share of episodes whose steps are 1/20 to 1/2 of a stride, the same throughout an episode, with as many
    jumps to the metre: a model that never saw itself creep does not know that it has set out, and hesitates.
    pause: chance per decision to move a tenth of it only, so that the ant often still stands where it has visited.
    whole: drop what comes after the last visit, if there is one: nobody can tell where an ant goes before it arrives.
    """
    layout, task, field, _ = solvable_layouts(world, tasks, count, rng)
    padded, lengths = pad_tasks(tasks)
    batch = AntBatch(world, layout, (padded[task], lengths[task]), rng)
    route, alive = ant_routes(field, rng), np.arange(count)
    moved = np.flatnonzero(rng.random(count) < on_colour)
    _displace(batch, field, alive, moved, _one_of(batch.colours[moved], rng), rng)
    obs = np.zeros((count, steps + 1, ant_slices(world)["local"].stop), dtype=np.float32)
    actions = np.zeros((count, steps, 8), dtype=np.float32)
    goal = np.full((count, steps), -1, dtype=np.int64)
    last = np.full(count, steps)  # steps up to the last visit
    asked = np.zeros_like(obs[:, 1:]) if elsewhere else obs[:, :-1]
    scale = np.ones(count)
    if short:
        scale = np.where(rng.random(count) < short, 0.5 * 10.0 ** -rng.random(count), 1.0)
    stray = np.where(scale < 1, 0.1 * np.sqrt(scale), 0.02)  # creeping, the base will hardly keep to the track
    obs[:, 0] = batch.observe()
    for t in range(steps):
        way = ant_direction(batch, route, alive)
        goal[alive, t] = batch.goal()
        if not elsewhere:
            actions[alive, t] = trot(batch.state, way)
        else:
            here = batch.state[:, XY].copy(), batch.cell.copy()
            moved = np.flatnonzero(rng.random(len(alive)) < elsewhere)
            _displace(batch, field, alive, moved, rng.integers(world.size**2, size=len(moved)), rng)
            asked[alive, t] = batch.observe()
            actions[alive, t] = trot(batch.state, ant_direction(batch, route, alive))
            batch.state[:, XY], batch.cell = here
        length = STRIDE_LENGTH * rng.uniform(0.5, 1.5, len(alive)) * scale[alive]
        if pause:
            length *= np.where(rng.random(len(alive)) < pause, 0.1, 1.0)
        xy = batch.state[:, XY] + length[:, None] * np.stack([np.cos(way), np.sin(way)], axis=1)
        xy = (xy + stray[alive, None] * rng.standard_normal(xy.shape)).clip(0.01 - batch._half, batch._half - 0.01)
        cell = batch._cell_of(xy)
        content = np.where(cell != batch.cell, batch.content[batch._rows, cell], -1)
        visit = (content >= 0) & (content == batch.goal())
        slipped = (content >= 0) & ~visit  # over a corner: it stays where it was
        xy[slipped], cell[slipped] = batch.state[slipped, XY], batch.cell[slipped]
        body = strides[rng.integers(len(strides), size=len(alive))]
        batch.state = rotate_ant(body, rng.uniform(-np.pi, np.pi, len(alive)))
        batch.state[:, XY], batch.cell = xy, cell
        batch.stage += visit
        last[alive[visit]] = t + 1
        done = batch.stage == batch.lengths
        moved = np.flatnonzero(~visit & (rng.random(len(alive)) < displace * scale[alive]))
        _displace(batch, field, alive, moved, rng.integers(world.size**2, size=len(moved)), rng)
        obs[alive, t + 1] = batch.observe()
        alive = alive[~done]
        batch.select(~done)
        if not len(alive):
            break
    if whole:
        beyond = np.arange(steps) >= last[:, None]
        goal[beyond], actions[beyond], asked[beyond], obs[:, 1:][beyond] = -1, 0, 0, 0
    return AntEpisodes(obs, actions, goal, goal >= 0, task, layout.colours, layout.walls, asked)


def make_batch(world: TaskSet, layout: Layout, tasks, rng: np.random.Generator, roam=False, threads=1):
    """Episodes of either kind of world that step together: `GridBatch` or `AntBatch`."""
    if world.ant:
        return AntBatch(world, layout, tasks, rng, roam, threads)
    return GridBatch(world, layout, tasks, roam)


# ----------------------------------------------------------------------------------------------------
# The ant's Gymnasium environment
# ----------------------------------------------------------------------------------------------------


class AntPinpad(gym.Env):
    """Ant pinpad: visit the colours of a hidden task in order, as MuJoCo's four-legged ant.

    ## Description
    A plane of size x size cells of 1.25 m with `colours` coloured cells and `walls` wall cells at random places. A
    coloured cell is visited when the torso's centre enters it from another cell. Defaults: the paper's 4x4
    post-training task. One step is 0.05 s.

    ## Action
    Box(-1, 1, (8,)): torques of hip_4, ankle_4, hip_1, ankle_1, hip_2, ankle_2, hip_3, ankle_3; clipped.

    ## Observation
    Box, (31 + 2 (colours + walls),) float32; 41 numbers by default. n is colours + walls:

    | index | part (`ant_slices`) | meaning |
    |---|---|---|
    | 0 | height | symlog of the torso's z |
    | 1 .. 4 | orientation | symlog of the torso's quaternion w, x, y, z |
    | 5 .. 12 | joints | symlog of hip and ankle angles of legs 1, 2, 3, 4 |
    | 13 .. 26 | velocity | symlog of the torso's velocity (3), turning rates (3), joint rates (8) |
    | 27, 28 | xy | torso's x, y; the grid is [-1, 1] |
    | 29 .. 28 + 2n | things | centre of each colour, then wall, minus torso: x, y; in half grids, like xy |
    | the last 2 | local | torso's x, y in its cell; the cell is [-1, 1] |

    Neither the task nor the history of visits is in it.

    ## Reward
    1 when the last colour of the task is visited in order, else 0.

    ## Start
    Colours, walls and ant on distinct cells, uniformly; the ant anywhere in its cell, with any yaw, joint angles and
    rates within 0.1 of standing still. Layouts are not checked for solvability unless
    `reset(options={"solvable": True})`.

    ## End
    Terminates when the task is solved, when a wrong colour or a wall cell is entered, when the torso is lower than
    0.2 m or higher than 1.0 m, when the simulation diverges, and after `limit` steps: the limit is part of the task.
    Never truncates. Off the grid the ant counts as in the nearest cell. `info["subgoal"]` is the true subgoal: for
    evaluation only.

    ## Arguments
    size, colours, walls, limit, task (a sequence of colours), render_mode ("ansi" or "rgb_array").
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 20}

    def __init__(self, size=4, colours=4, walls=1, limit=500, task=None, render_mode=None):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r} must be None, 'ansi' or 'rgb_array'")
        task = ANT.post if task is None else tuple(task)
        self.world = TaskSet(size, colours, walls, limit, tuple((c,) for c in range(colours)), (task,), task)
        self.render_mode = render_mode
        self.action_space = gym.spaces.Box(-1.0, 1.0, (8,), np.float32)
        # No number gets larger: the largest are those of an ant ANT_LARGEST metres off the grid, in half cells.
        bound = 2 * ANT_LARGEST / ANT_CELL
        self.observation_space = gym.spaces.Box(-bound, bound, (ant_slices(self.world)["local"].stop,), np.float32)
        self._batch: AntBatch | None = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if (options or {}).get("solvable"):
            layout = solvable_layouts(self.world, [self.world.post], 1, self.np_random)[0]
        else:
            layout = sample_layouts(self.world, 1, self.np_random)
        self._batch = AntBatch(self.world, layout, [self.world.post], self.np_random)
        return self._batch.observe()[0], self._info()

    def step(self, action):
        if np.shape(action) != (8,):
            raise ValueError(f"action={action!r} must be 8 torques")
        if self._batch is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        _, reward, done = self._batch.step(np.asarray(action)[None])
        return self._batch.observe()[0], float(reward[0]), bool(done[0]), False, self._info()

    def render(self):
        if self._batch is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self.render_mode == "ansi":
            return grid_text(self.world, self._batch.content[0], int(self._batch.cell[0]))
        if self.render_mode == "rgb_array":
            return ant_picture(self.world, self._batch.content[0], self._batch.state[0])
        return None

    def _info(self) -> dict:
        return {"subgoal": int(self._batch.subgoal()[0]), "visits": int(self._batch.stage[0])}


def ant_picture(world: TaskSet, content: np.ndarray, state: np.ndarray, scale: int = 48) -> np.ndarray:
    """The cells seen from above with the ant as drawn discs: torso, and knee and foot of each leg; state (30,)."""
    picture = cell_picture(world, content, scale)
    metres = (np.arange(world.size * scale) + 0.5) / scale * ANT_CELL - world.size * ANT_CELL / 2
    hip, ankle = state[JOINTS].reshape(4, 2).T
    # The plane as complex numbers; ant.xml's legs: torso to hip, hip to ankle, twice that from ankle to foot.
    towards = np.hypot(0.2, 0.2) * np.exp(1j * (LEG_AZIMUTH + yaw_of(state)))
    upper = towards * np.exp(1j * hip)
    joints = np.cumsum([0 * towards, towards, upper, 2 * np.cos(ankle) * upper], axis=0)  # (4 joints, 4 legs)
    along = np.linspace(0, 1, 8)[:, None, None]
    legs = (joints[:-1] + along * np.diff(joints, axis=0)).reshape(-1)
    for place, radius in [(0, 0.25), *((place, 0.05) for place in legs)]:
        dx, dy = metres - state[1] - place.real, -metres - state[2] - place.imag  # row 0 is the largest y
        picture[dx[None] ** 2 + dy[:, None] ** 2 < radius**2] = 0
    return picture


gym.register(id="InternalRL/AntPinpad-v0", entry_point=AntPinpad, nondeterministic=False)
