"""Pinpad worlds: visit coloured cells in a hidden order, one reward at the very end.

This file holds the tasks of the paper (arXiv 2512.20605, App. A): rules, task tables and experts of the grid, then of
the ant. `internal_rl.py` sees them through one door, the members of `World` and `Batch` (its embeddings, pictures and
`--phase watch` also look at cells):

    world.episodes(count, rng)      expert trajectories to learn from, `Episodes`
    world.held_out(count)           clean ones that are never learned from
    world.shuffled(obs, rng)        * what the encoder reads instead of the trajectory itself (`World`'s needs cells)
    world.is_entry(obs)             * at which steps the encoder may propose
    world.expert_success(count)     in the RL task
    world.batch(count, rng)         episodes of the RL task, to act in: * observe, * step, subgoal, select
    world.scattered(count, rng)     the same, on one layout from everywhere
    world.floor(episodes)           loss of the best possible predictor of the expert, where it is known
    world.places(obs)               * where everything is, to draw it

A world of another kind brings those with a star, and `kind`, `start` (its batch) and `expert`. (For Gymnasium it also
needs `fps`, `spaces` and `paper_observation`.) Everything is written once, for a batch of episodes, in numpy. The
Gymnasium environments are views of a batch of one:

    import gymnasium, envs
    env = gymnasium.make("InternalRL/GridPinpad-v0")           # the paper's 7x7 grid and RL task
    env = gymnasium.make("InternalRL/GridPinpad-v0", size=5, colours=4, walls=2, task=(0, 2, 1))
    env = gymnasium.make("InternalRL/AntPinpad-v0")            # the paper's ant and RL task

Conventions: a cell is one number, row * size + column, row 0 on top. Grid actions: 0 up, 1 down, 2 left, 3 right.
N or B episodes, T steps, F numbers in an observation, G the grid's size, O colours, W walls, L visits in a task.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right
FAR = 127  # "no path" in the int8 distance fields


# ----------------------------------------------------------------------------------------------------
# What both worlds share: tasks, layouts, rules, the Gymnasium view (paper: App. A)
# ----------------------------------------------------------------------------------------------------


class Episodes(NamedTuple):
    """N expert trajectories, padded to T steps."""

    obs: np.ndarray  # (N, T + 1, F), the last one included; `GridWorld` and `AntWorld` say what it is
    target: np.ndarray  # (N, T, ...) the expert's action; grid: a number; ant: 8 torques; 0 in the padding
    goal: np.ndarray  # (N, T) colour pursued, -1 in the padding; ground truth, for evaluation only
    mask: np.ndarray  # (N, T) True on real steps

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, (N,): also the place of its last observation in `obs`."""
        return self.mask.sum(axis=1)

    def take(self, index) -> Episodes:
        """The episodes of `index`, with the padding cut to the longest of them."""
        T = int(self.mask[index].sum(axis=1).max())
        return Episodes(*(part[index, : T + (name == "obs")] for name, part in self._asdict().items()))

    def chunks(self, size: int = 64):
        """The episodes in groups of `size`, so that they fit the memory."""
        return (Episodes(*(part[i : i + size] for part in self)) for i in range(0, len(self.mask), size))


@dataclass(frozen=True)
class World:
    """The sizes and tasks of one pinpad world. A task is the sequence of colours to visit, in order."""

    size: int  # G: the grid has G x G cells
    colours: int  # O
    walls: int  # W
    limit: int  # T: an episode that is not solved after this many steps ends with reward 0
    subgoals: tuple[tuple[int, ...], ...]  # the colours of each subgoal ("abstract action")
    pretrain_tasks: tuple[tuple[int, ...], ...]  # tasks of the unlabelled expert trajectories
    rl_task: tuple[int, ...]  # the task of reinforcement learning
    jumps: float = 0.0  # chance per step that a training episode goes on from another cell (the paper has none)
    threads: int = 1  # of MuJoCo; no result depends on their number

    kind = ""  # which embedding and action head the model takes
    tolerance = 1  # a switch this many steps from a true change of subgoal is a hit
    shown_every = 1  # steps, when an episode is watched

    def __post_init__(self):
        for name, least in (("size", 2), ("colours", 1), ("walls", 0), ("limit", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small: it must be at least {least}")
        if self.objects > self.size**2:
            raise ValueError(f"colours={self.colours}, walls={self.walls}, agent: too many for size={self.size}")
        if sorted(colour for goal in self.subgoals for colour in goal) != list(range(self.colours)):
            raise ValueError(f"subgoals={self.subgoals} must hold each colour 0..{self.colours - 1} once")
        if len({len(goal) for goal in self.subgoals}) > 1:
            raise ValueError(f"subgoals={self.subgoals} must all have the same number of colours")
        for task in (*self.pretrain_tasks, self.rl_task):
            if not task or any(not 0 <= colour < self.colours for colour in task):
                raise ValueError(f"task={tuple(task)} must be a non-empty sequence of colours 0..{self.colours - 1}")
            if any(a == b for a, b in zip(task[:-1], task[1:])):
                raise ValueError(f"task={tuple(task)} repeats a colour at once: a visit needs a move from elsewhere")

    @property
    def objects(self) -> int:
        """Things that lie on the grid: O colours, W walls and the agent."""
        return self.colours + self.walls + 1

    @property
    def counting_success(self) -> float:
        """Success of choosing among the subgoals at random: (1 / subgoals) ** (subgoals in the task)."""
        return len(self.subgoals) ** -(len(self.rl_task) / len(self.subgoals[0]))

    def subgoal_of(self, goal: np.ndarray) -> np.ndarray:
        """Index of the subgoal that each colour belongs to, -1 for -1."""
        index = np.full(self.colours + 1, -1)
        for i, subgoal in enumerate(self.subgoals):
            index[list(subgoal)] = i
        return index[goal]

    def transitions(self, task) -> set[tuple[int, int]]:
        """The pairs (subgoal a, next subgoal b) of a task."""
        names = self.subgoal_of(np.array(task))[:: len(self.subgoals[0])]
        return {(int(a), int(b)) for a, b in zip(names[:-1], names[1:])}

    def batch(self, count: int, rng, roam=False) -> Batch:
        """`count` episodes of the RL task on random solvable layouts, to act in."""
        layout, tasks, _ = solvable_layouts(self, [self.rl_task], count, rng)
        return self.start(layout, tasks, rng, roam)

    def scattered(self, count: int, rng) -> Batch:
        """`count` episodes on one layout, each from any free cell; visits end nothing."""
        layout, tasks, _ = solvable_layouts(self, [self.rl_task], 1, rng)
        batch = self.start(layout.repeat(count, axis=0), tasks.repeat(count, axis=0), rng, roam=True)
        batch.place(batch.rows, one_of(batch.content < 0, rng))
        return batch

    def episodes(self, count: int, rng: np.random.Generator) -> Episodes:
        """`count` trajectories of the expert to learn from.

        With chance `jumps` a step that is no visit is followed by a jump to a random free cell, if there is a way from
        it to the goal. Targets are the expert's actions everywhere.
        """
        return self.simulate(self.pretrain_tasks, count, rng, self.jumps)[0]

    def held_out(self, count: int) -> Episodes:
        """Trajectories without jumps for evaluation, ants simulated: the same for every seed, never trained on."""
        return self.simulate(self.pretrain_tasks, count, np.random.default_rng(10**9))[0]

    def expert_success(self, count: int) -> float:
        """The expert's success on solvable layouts of the RL task."""
        return self.simulate([self.rl_task], count, np.random.default_rng(10**9 + 1))[1]

    def floor(self, episodes: Episodes) -> float | None:
        """Loss of the best possible predictor of the expert, nats per episode; None where it is not known."""
        return None

    def shuffled(self, cells: np.ndarray, rng) -> np.ndarray:
        """The cells (N, T, K) after a random permutation of the grid's cells, another one for each of N episodes."""
        tables = rng.permuted(np.tile(np.arange(self.size**2), (len(cells), 1)), axis=1)
        return tables[np.arange(len(cells))[:, None, None], cells]

    def simulate(self, tasks, count: int, rng, jumps: float = 0.0) -> tuple[Episodes, float]:
        """`count` trajectories on random solvable layouts, each up to its last visit -> episodes, success rate."""
        parts, made, tried, solved = [], 0, 0, 0
        while made < count:
            if tried > 1000 and not made:
                raise ValueError(f"the expert visited nothing in {tried} episodes: a longer limit might help")
            trials = min(512, count - made)  # fits the processor's cache
            episodes, successes = self._simulate_chunk(tasks, trials, rng, jumps)
            some = episodes.mask.any(axis=1)
            parts.append([part[some] for part in episodes])
            made, tried, solved = made + int(some.sum()), tried + trials, solved + successes
        return Episodes(*(np.concatenate(column) for column in zip(*parts))).take(slice(None)), solved / tried

    def _simulate_chunk(self, tasks, count: int, rng, jumps: float) -> tuple[Episodes, int]:
        """As `simulate`. An episode ends with its last visit: nothing shows where the expert goes after it."""
        layout, tasks, field = solvable_layouts(self, tasks, count, rng)
        batch, alive = self.start(layout, tasks, rng), np.arange(count)
        seen, target, successes = batch.observe(), None, 0
        obs = np.zeros((count, self.limit + 1, seen.shape[1]), dtype=seen.dtype)
        goal, length = np.full((count, self.limit), -1), np.zeros(count, dtype=int)
        obs[:, 0] = seen
        for t in range(self.limit):
            wanted, action = self.expert(batch, field, alive, rng)
            if target is None:
                target = np.zeros((count, self.limit, *wanted.shape[1:]), dtype=wanted.dtype)
            target[alive, t], goal[alive, t] = wanted, batch.goal()
            visited, reward, done = batch.step(action)
            length[alive[visited == goal[alive, t]]] = t + 1
            successes += int(reward.sum())
            batch.jump(jumps * (visited < 0), field, alive)
            obs[alive, t + 1] = batch.observe()
            alive = alive[~done]
            batch.select(~done)
            if not len(alive):
                break
        beyond = np.arange(self.limit) >= length[:, None]
        goal[beyond], target[beyond], obs[:, 1:][beyond] = -1, 0, 0
        return Episodes(obs, target, goal, goal >= 0), successes


def sample_layouts(world: World, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` layouts, (count, O + W + 1): cells of colours, walls and agent, all different, uniformly."""
    keys = rng.random((count, world.size**2), dtype=np.float32)
    cells = np.argpartition(keys, world.objects - 1, axis=1)[:, : world.objects]
    return rng.permuted(cells, axis=1)  # argpartition's own order is not uniform


def pad_tasks(tasks) -> np.ndarray:
    """Tasks of unequal length -> colours (B, L + 1), each row padded with at least one -1."""
    padded = np.full((len(tasks), max(map(len, tasks)) + 1), -1)
    for row, task in zip(padded, tasks):
        row[: len(task)] = task
    return padded


class Batch:
    """B episodes that step together, by the rules of pinpad. Finished ones are dropped with `select`.

    layout: what `sample_layouts` draws. tasks: what `pad_tasks` makes of B tasks. rng: where randomness comes from.
    roam: visits neither count nor end anything (to see where a policy goes). Subclasses move the agent, in `step`, and
    show it, in `observe`."""

    def __init__(self, world: World, layout: np.ndarray, tasks: np.ndarray, rng: np.random.Generator, roam=False):
        self.world, self.tasks, self.rng, self.roam = world, tasks, rng, roam
        self.things, self.cell = layout[:, :-1], layout[:, -1].copy()  # cells, (B, O + W); that of the agent, (B,)
        B = len(self.cell)
        # What lies on each cell: colour 0..O-1, wall O..O+W-1, nothing -1.
        self.content = np.full((B, world.size**2), -1)
        np.put_along_axis(self.content, self.things, np.arange(self.things.shape[1])[None], axis=1)
        self.stage = np.zeros(B, dtype=np.int64)  # visits done so far
        self.time = np.zeros(B, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.cell)

    @property
    def rows(self) -> np.ndarray:
        return np.arange(len(self))

    def goal(self) -> np.ndarray:
        """The colour to visit next, -1 once solved, (B,). Hidden from the agent."""
        return self.tasks[self.rows, self.stage]

    def subgoal(self) -> np.ndarray:
        """Index of the current subgoal, -1 once solved, (B,). For evaluation only."""
        return self.world.subgoal_of(self.goal())

    def select(self, index: np.ndarray) -> None:
        """Keep only the episodes of `index` (a mask or indices), so that no work is done for the dead."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[index])

    def arrive(self, cell: np.ndarray, failed=False):
        """The rules, for agents that are now on `cell` (B,) -> visited colour or -1 (B,), reward (B,), done (B,).

        A colour is visited by moving onto it from another cell. An episode ends when the task is solved (reward 1),
        when a wrong colour is visited, where it `failed`, and after `limit` steps."""
        content = np.where(cell != self.cell, self.content[self.rows, cell], -1)
        visited = np.where(content < self.world.colours, content, -1)
        self.cell = cell
        self.time += 1
        over = failed | (self.time >= self.world.limit)
        if self.roam:
            return visited, np.zeros(len(self), dtype=np.float32), over
        correct = (visited >= 0) & (visited == self.goal()) & ~np.asarray(failed)
        self.stage += correct
        solved = self.goal() < 0
        return visited, solved.astype(np.float32), solved | over | ((visited >= 0) & ~correct)

    def jump(self, chance: np.ndarray, field: np.ndarray, alive: np.ndarray) -> None:
        """With this chance (B,) an agent goes on from a random free cell, if the goal can be reached from it.

        field (., O, G*G): distances; alive (B,): each episode's row of it."""
        chosen = np.flatnonzero(self.rng.random(len(self)) < chance)
        cell = one_of(self.content[chosen] < 0, self.rng)
        reachable = field[alive[chosen], self.goal()[chosen], cell] < FAR
        self.place(chosen[reachable], cell[reachable])

    def place(self, index: np.ndarray, cell: np.ndarray) -> None:
        """Put the agents of the episodes `index` on these cells."""
        self.cell[index] = cell


COLOURS = np.array([
    (230, 60, 60), (60, 110, 230), (60, 170, 75), (240, 200, 40),
    (150, 70, 190), (240, 140, 40), (70, 200, 220), (240, 130, 190),
], dtype=np.uint8)  # fmt: skip


def grid_text(world: World, content: np.ndarray, agent: int) -> str:
    """One character a cell: digits are colours, # walls, @ the agent (* when it stands on a colour)."""
    marks = np.array([*(str(c % 10) for c in range(world.colours)), *"#" * world.walls, "."])[content]
    marks[agent] = "*" if 0 <= content[agent] < world.colours else "@"
    return "\n".join(" ".join(row) for row in marks.reshape(world.size, world.size)) + "\n"


def cell_picture(world: World, content: np.ndarray, scale: int) -> np.ndarray:
    """The colours and dark walls as an RGB picture, (G*scale, G*scale, 3) uint8."""
    colours = COLOURS[np.arange(world.colours) % len(COLOURS)]
    palette = np.array([*colours, *[(70, 70, 70)] * world.walls, (245, 245, 245)], dtype=np.uint8)
    return palette[content].reshape(world.size, world.size, 3).repeat(scale, axis=0).repeat(scale, axis=1)


# ----------------------------------------------------------------------------------------------------
# Shortest paths: which layouts can be solved, and what the experts know
# ----------------------------------------------------------------------------------------------------


@functools.cache
def neighbour_table(size: int) -> np.ndarray:
    """Cell reached by each action on an empty grid, (G*G, 4); a move out of the grid stays."""
    row, column = np.divmod(np.arange(size * size), size)
    table = [np.clip(row + dr, 0, size - 1) * size + np.clip(column + dc, 0, size - 1) for dr, dc in MOVES]
    return np.stack(table, axis=1)


def distance_fields(world: World, layout: np.ndarray) -> np.ndarray:
    """Steps from every cell to every colour, walls and the *other* colours being obstacles.

    Returns (B, O, G*G) int8, FAR where there is no path. Relaxation: d = min(d, 1 + min over neighbours),
    all fields at once, with a border of FAR around the grid and the batch last, where numpy is fastest."""
    B, G, O = len(layout), world.size, world.colours
    field = np.full((G + 2, G + 2, O, B), FAR, dtype=np.int8)
    inner, least = field[1:-1, 1:-1], np.zeros((G, G, O, B), dtype=np.int8)  # least: FAR on obstacles
    places = [(*np.divmod(cell, G), np.arange(B)) for cell in layout[:, :-1].T]
    for row, column, episode in places:
        least[row, column, :, episode] = FAR
    for colour, (row, column, episode) in enumerate(places[:O]):
        least[row, column, colour, episode] = inner[row, column, colour, episode] = 0
    neighbours = field[:-2, 1:-1], field[2:, 1:-1], field[1:-1, :-2], field[1:-1, 2:]
    while True:
        best = functools.reduce(np.minimum, neighbours)
        best += best < FAR
        best = np.maximum(np.minimum(best, inner), least)
        if np.array_equal(best, inner):
            return np.ascontiguousarray(inner.transpose(3, 2, 0, 1)).reshape(B, O, G * G)
        inner[...] = best


def shortest_actions(field: np.ndarray, rows, target, agent) -> np.ndarray:
    """Which actions lie on a shortest path: a mask (B, 4). field (., O, G*G); rows, target, agent (B,)."""
    neighbour = neighbour_table(round(field.shape[-1] ** 0.5))[agent]
    reach = field[rows[:, None], target[:, None], neighbour]  # (B, 4)
    return (reach == reach.min(axis=1, keepdims=True)) & (reach < FAR) & (neighbour != agent[:, None])


def solvable(field: np.ndarray, layout: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Whether every leg of the task has a path that avoids walls and wrong colours, (B,)."""
    rows, start = np.arange(len(tasks)), layout[:, -1]
    ok = np.ones(len(tasks), dtype=bool)
    for goal in tasks[:, :-1].T:
        # The start may itself be a coloured cell, an obstacle of this field: ask for a way out of it.
        ok &= (goal < 0) | shortest_actions(field, rows, goal, start).any(axis=1)
        start = layout[rows, goal]  # means nothing where the task is over, and no longer matters there
    return ok


def solvable_layouts(world: World, tasks, count: int, rng: np.random.Generator):
    """`count` random solvable (layout, task) pairs, by rejection.

    Returns layout, tasks as of `pad_tasks`, distance fields. Given the layout, the task is then uniform over the tasks
    that can be solved on it, as `bayes_predictor` (the grid's best predictor) assumes."""
    padded = pad_tasks(tasks)
    parts, drawn, kept = [], 0, 0
    while kept < count:
        if drawn > 10_000 and not kept:
            raise ValueError(f"no solvable layout in {drawn} draws: fewer walls or colours, or a larger size")
        layout = sample_layouts(world, max(64, int(1.25 * (count - kept))), rng)
        index = rng.integers(len(tasks), size=len(layout))
        field = distance_fields(world, layout)
        ok = np.flatnonzero(solvable(field, layout, padded[index]))
        drawn += len(index)
        kept += len(ok)
        parts.append((layout[ok], padded[index[ok]], field[ok]))
    return [np.concatenate(column)[:count] for column in zip(*parts)]


def one_of(allowed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One allowed column per row, uniformly; allowed (B, K) has a True in every row."""
    return np.argmax(allowed * (1 + rng.random(allowed.shape, dtype=np.float32)), axis=1)


# ----------------------------------------------------------------------------------------------------
# The grid: moves, expert, Bayes-optimal predictor
# ----------------------------------------------------------------------------------------------------


class GridBatch(Batch):
    """B episodes of grid pinpad that step together."""

    def step(self, actions: np.ndarray):
        """actions (B,) -> visited colour or -1 (B,), reward (B,), done (B,)."""
        target = neighbour_table(self.world.size)[self.cell, actions]
        wall = self.content[self.rows, target] >= self.world.colours
        return self.arrive(np.where(wall, self.cell, target))

    def observe(self) -> np.ndarray:
        """Cell of every colour, every wall and the agent, (B, O + W + 1)."""
        return np.concatenate([self.things, self.cell[:, None]], axis=1)

    def paper_observation(self) -> np.ndarray:
        """For each cell what is there: O colours, W walls, agent; 0 or 1, (B, G*G*(O+W+1)) float32."""
        ones = self.observe()[:, None] == np.arange(self.world.size**2)[:, None]  # (B, G*G, O+W+1)
        return ones.reshape(len(self), -1).astype(np.float32)


@dataclass(frozen=True)
class GridWorld(World):
    """Grid pinpad. An observation is the cells of colours, walls and agent: F = O + W + 1 integers."""

    kind, fps = "grid", 4

    def spaces(self):
        return gym.spaces.Discrete(4), gym.spaces.Box(0.0, 1.0, (self.size**2 * self.objects,), np.float32)

    def start(self, layout, tasks, rng, roam=False) -> GridBatch:
        return GridBatch(self, layout, tasks, rng, roam)

    def expert(self, batch: GridBatch, field, alive, rng):
        """Takes a shortest path; of several good moves each is equally likely -> moves (B,), to learn and to do."""
        action = one_of(shortest_actions(field, alive, batch.goal(), batch.cell), rng)
        return action, action

    def floor(self, episodes: Episodes) -> float:
        """Loss of the Bayes-optimal predictor, which infers the task from the moves so far, nats per episode."""
        p = np.maximum(bayes_predictor(self, episodes), 1e-12)
        p = np.take_along_axis(p, episodes.target[..., None], axis=-1)[..., 0]
        return float(-(np.log(p) * episodes.mask).sum() / len(episodes.mask))

    def is_entry(self, obs: np.ndarray) -> np.ndarray:
        """On the grid all steps, (N, T)."""
        return np.ones(obs.shape[:2], dtype=bool)

    def places(self, obs: np.ndarray) -> np.ndarray:
        """Column and row of each colour, each wall and the agent in units of cells, (..., O + W + 1, 2)."""
        return np.stack([obs % self.size, obs // self.size], axis=-1) + 0.5


def bayes_predictor(world: GridWorld, episodes: Episodes) -> np.ndarray:
    """The best possible next-action probabilities given the observations so far, (N, T, 4).

    The task is hidden; p(task | o_1:t) is proportional to p(o_1:t | task), the expert's likelihood of the moves so
    far, over the tasks that can be solved on this layout. For episodes without jumps."""
    tasks = pad_tasks(world.pretrain_tasks)
    (N, T), K = episodes.mask.shape, len(tasks)
    layout, agent = episodes.obs[:, 0], episodes.obs[..., -1]  # what is observed is a layout
    field = distance_fields(world, layout)
    posterior = np.stack([solvable(field, layout, np.tile(task, (N, 1))) for task in tasks], axis=1).astype(float)
    rows, stage = np.repeat(np.arange(N), K), np.zeros(N, dtype=np.int64)
    result = np.zeros((N, T, 4), dtype=np.float32)
    for t in range(T):
        goals = tasks[:, np.minimum(stage, tasks.shape[1] - 1)].T  # (N, K); -1 where the task is over
        best = shortest_actions(field, rows, np.maximum(goals, 0).reshape(-1), np.repeat(agent[:, t], K))
        chance = best / np.maximum(best.sum(axis=1, keepdims=True), 1)
        chance = chance.reshape(N, K, 4) * (goals >= 0)[..., None]
        posterior *= goals >= 0  # the episode goes on, so a task that would be over is not the one
        posterior /= np.maximum(posterior.sum(axis=1, keepdims=True), 1e-30)
        result[:, t] = (posterior[..., None] * chance).sum(axis=1)
        taken = neighbour_table(world.size)[agent[:, t]] == agent[:, t + 1, None]  # (N, 4)
        posterior *= (chance * taken[:, None]).sum(axis=2)  # the likelihood of the move
        if t + 1 < T:  # a visit also tells which tasks are still possible
            visit = episodes.mask[:, t + 1] & (episodes.goal[:, t + 1] != episodes.goal[:, t])
            posterior *= ~visit[:, None] | (goals == episodes.goal[:, t, None])
            stage += visit
    return result * episodes.mask[..., None]  # what was computed for the padding means nothing


# ----------------------------------------------------------------------------------------------------
# The ant: physics and observation
#
# The world is G x G cells of CELL metres around the origin, x to the right, y up: row 0 has the largest y. A state is
# MuJoCo's: time, position (x y z, quaternion w x y z, hip and ankle of legs 1 to 4), velocity (the same but for the
# quaternion: 3 turning rates). Torques are in MuJoCo's order, leg 4 first: hip_4, ankle_4, hip_1, ...
# ----------------------------------------------------------------------------------------------------

CELL = 1.25  # metres; ours: then the way to a colour takes about as many steps as in the paper's Fig. 6
SUBSTEPS = 5  # of 0.01 s; not given in the paper, so as in Gymnasium's ant
LOWEST, HIGHEST = 0.2, 1.0  # of the torso; outside, the episode ends
LARGEST = 200.0  # m, rad, m/s or rad/s: beyond, the simulation has diverged (random torques reach about 20)
XY, HEIGHT, QUATERNION, JOINTS, JOINT_RATES = slice(1, 3), 3, slice(4, 8), slice(8, 16), slice(22, 30)  # in the state
STANDING = (0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1)  # as in ant.xml (from joints all at 0 most ants fall)


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
    """One control step: state (B, 30), torques (B, 8), which MuJoCo clips to [-1, 1] -> state (B, 30)."""
    model, scratch, pool = ant_physics(threads)
    states, _ = pool.rollout(model, scratch, state, torques[:, None].astype(float), nstep=SUBSTEPS)
    return states[:, -1]


class AntBatch(Batch):
    """B episodes of ant pinpad that step together.

    Starts, which rng draws, and ends are those that `PinpadEnv` describes; a torque that is not finite is an end, too.
    These ends hold with `roam`, too. Lying upside down ends nothing, as the height does not show it: see `upright`."""

    def __init__(self, world: AntWorld, layout, tasks, rng: np.random.Generator, roam=False):
        super().__init__(world, layout, tasks, rng, roam)
        B = len(self)
        self.state = self._standing(self.cell)  # (B, 30)
        self.state[:, XY] += rng.uniform(-CELL / 2, CELL / 2, (B, 2))
        yaw = rng.uniform(-np.pi, np.pi, B)
        self.state[:, 4], self.state[:, 7] = np.cos(yaw / 2), np.sin(yaw / 2)
        self.state[:, JOINTS] += rng.uniform(-0.1, 0.1, (B, 8))
        self.state[:, JOINT_RATES] = rng.uniform(-0.1, 0.1, (B, 8))

    def _standing(self, cell: np.ndarray) -> np.ndarray:
        """The state of standing still at the centre of these cells."""
        state = np.zeros((len(cell), 30))
        state[:, 1:16] = STANDING
        state[:, XY] = self.world.centres[cell]
        return state

    def step(self, actions: np.ndarray):
        """torques (B, 8), clipped to [-1, 1] -> visited colour or -1 (B,), reward (B,), done (B,)."""
        sane = np.isfinite(actions).all(axis=1)
        self.state = ant_simulate(self.state, np.where(sane[:, None], actions, 0), self.world.threads)
        sane &= (np.abs(self.state[:, 1:]) < LARGEST).all(axis=1)  # also False where it is not finite
        self.state[~sane] = self._standing(self.cell[~sane])
        cell = self.world.cell_of(self.state[:, XY])
        fallen = (self.state[:, HEIGHT] < LOWEST) | (self.state[:, HEIGHT] > HIGHEST)
        wall = (cell != self.cell) & (self.content[self.rows, cell] >= self.world.colours)
        return self.arrive(cell, ~sane | fallen | wall)

    def upright(self) -> np.ndarray:
        """Whether the torso's own z axis points up, (B,)."""
        return (self.state[:, 5:7] ** 2).sum(axis=1) < 0.5  # x and y of the quaternion: z . up = 1 - 2 (x^2 + y^2)

    def place(self, index: np.ndarray, cell: np.ndarray) -> None:
        """Put the ants of the episodes `index` anywhere in these cells. They keep posture and speed."""
        super().place(index, cell)
        self.state[index, XY] = self.world.centres[cell] + self.rng.uniform(-CELL / 2, CELL / 2, (len(index), 2))

    def observe(self) -> np.ndarray:
        """The paper's observation, (B, 31 + 2 (O + W)) float32: the parts of `AntWorld.parts`, in that order."""
        xy, half, body = self.state[:, XY], self.world.half, self.state[:, HEIGHT:]
        symlog = np.sign(body) * np.log1p(np.abs(body))
        things = self.world.centres[self.things] - xy[:, None]  # (B, O + W, 2)
        local = xy - self.world.centres[self.cell]
        parts = [symlog, xy / half, things.reshape(len(self), -1) / half, local / (CELL / 2)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    paper_observation = observe


# ----------------------------------------------------------------------------------------------------
# The ant's expert, a scripted trot
# ----------------------------------------------------------------------------------------------------

LEG_AZIMUTH = np.pi / 4 + np.pi / 2 * np.arange(4)  # of legs 1 to 4, seen from the torso
ANKLE_SIGN = np.array([1, -1, -1, 1])  # ant.xml bends these ankles to this side
DIAGONAL = np.array([1, -1, 1, -1])  # a trot: legs 1 and 3 against legs 2 and 4


def yaw_of(quaternion: np.ndarray) -> np.ndarray:
    """Where the x axis of a body with this orientation points, seen from above, (..., 4) -> (...)."""
    w, x, y, z = np.moveaxis(quaternion, -1, 0)
    return np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def trot(state: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """A clock-free trot: state (B, 30), direction of travel (B,) in radians -> torques (B, 8) in [-1, 1].

    The phase is read from the ankles: theta = atan2(-sum, -rate of the sum / w0) + delta over the alternating sum
    of their angles. Each leg swings along the direction and lifts in the other half of its turn:
    hip -> -A cos(theta) tangential, ankle -> 1 - L sin(theta) + B cos(theta) radial, by a PD controller.
    The numbers were searched for and have sharp edges (kp 1.6 instead of 1.1 halves the success)."""
    A, B, L, kp, kd, delta, w0 = 0.20, 0.35, 0.24, 1.1, 0.135, 2.45, 15.0
    hip, ankle = state[:, JOINTS].reshape(-1, 4, 2).transpose(2, 0, 1)  # (B, 4), legs 1 to 4
    hip_rate, ankle_rate = state[:, JOINT_RATES].reshape(-1, 4, 2).transpose(2, 0, 1)
    ankle, ankle_rate = ankle * ANKLE_SIGN, ankle_rate * ANKLE_SIGN
    angle = LEG_AZIMUTH + (yaw_of(state[:, QUATERNION]) - direction)[:, None]
    radial, tangential = np.cos(angle), -np.sin(angle)
    theta = np.arctan2(-(ankle * DIAGONAL).sum(axis=1), -(ankle_rate * DIAGONAL).sum(axis=1) / w0) + delta
    c, s = DIAGONAL * np.cos(theta)[:, None], DIAGONAL * np.sin(theta)[:, None]
    hip_torque = kp * (-A * c * tangential - hip) - kd * hip_rate
    ankle_torque = ANKLE_SIGN * (kp * (1 - L * s + B * c * radial - ankle) - kd * ankle_rate)
    legs = np.stack([hip_torque, ankle_torque], axis=-1)[:, [3, 0, 1, 2]]  # MuJoCo's actuators start with leg 4
    return legs.reshape(-1, 8).clip(-1, 1)


def ant_direction(batch: AntBatch, field: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where the expert walks, (B,) in radians: to the centre of the next cell on a shortest path; field (., O, G*G).

    Of several always the same one, so that the torques follow from place and goal; where there is no way, to that of
    its own cell. rows (B,): each episode's row of the field."""
    best = shortest_actions(field, rows, batch.goal(), batch.cell)
    step = neighbour_table(batch.world.size)[batch.cell, best.argmax(axis=1)]
    target = batch.world.centres[np.where(best.any(axis=1), step, batch.cell)]
    dx, dy = (target - batch.state[:, XY]).T
    return np.arctan2(dy, dx)


STRIDE_LENGTH = 0.8  # metres, most of a cell; from one step of a spliced trajectory to the next: 0 to 1.5 of it


@functools.cache
def ant_strides(noise: float, count: int = 16_384) -> np.ndarray:
    """Moments of walking ants for spliced trajectories: states (count, 30), turned so that all walk along x.

    256 ants trot on an empty plane, with torque noise of this deviation. Their direction drifts, and after one step in
    twenty, at random, it turns by a quarter or a half. Every 4th step is kept, also those in which an ant has just
    begun to turn. Each ant starts anew after 200 steps on average, or when it has fallen. The same for every seed."""
    rng, world = np.random.default_rng(10**9), WORLDS["ant"]
    layout, tasks = sample_layouts(world, 256, rng), pad_tasks([world.rl_task] * 256)
    start = lambda: world.start(layout, tasks, rng)
    batch, kept, made, t = start(), [], 0, 0
    direction = rng.uniform(-np.pi, np.pi, 256)
    while made < count:
        turns = rng.choice([np.pi / 2, -np.pi / 2, np.pi], 256) * (rng.random(256) < 1 / 20)
        direction = direction + turns + 0.03 * rng.standard_normal(256)
        torques = trot(batch.state, direction) + noise * rng.standard_normal((256, 8))
        batch.state = ant_simulate(batch.state, torques)
        height = batch.state[:, HEIGHT]
        fallen = (height < LOWEST) | (height > HIGHEST) | ~batch.upright()
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
    # Of the velocities only the torso's turn: its turning rates are measured in its own frame.
    velocity = (state[:, 16] + 1j * state[:, 17]) * np.exp(1j * angle)
    turned[:, 16], turned[:, 17] = velocity.real, velocity.imag
    half = np.exp(0.5j * angle)
    one, two = (state[:, 4] + 1j * state[:, 7]) * half, (state[:, 5] + 1j * state[:, 6]) * half
    turned[:, 4], turned[:, 7], turned[:, 5], turned[:, 6] = one.real, one.imag, two.real, two.imag
    return turned


class SplicedBatch(AntBatch):
    """Ants to learn from, without simulation: a step is one decision, up to one and a half strides after the last.

    Between two decisions the ant moves on its way, a little or most of a cell; how its body moves then is one of
    `ant_strides`, turned by a random angle. The targets are the expert's torques for the place and the body. The body
    is drawn at random, so it carries no hint about the goal. Without this the model copies its current velocity and
    ignores the goal (imitation learning's copycat problem)."""

    def step(self, way: np.ndarray):
        """Where each ant walks, (B,) in radians -> visited colour or -1 (B,), reward (B,), done (B,)."""
        B, rng, half = len(self), self.rng, self.world.half
        length = 1.5 * STRIDE_LENGTH * rng.random(B)
        xy = self.state[:, XY] + length[:, None] * np.stack([np.cos(way), np.sin(way)], axis=1)
        xy = (xy + 0.04 * rng.standard_normal(xy.shape)).clip(0.01 - half, half - 0.01)
        cell = self.world.cell_of(xy)
        content = self.content[self.rows, cell]
        slipped = (content >= 0) & (content != self.goal()) & (cell != self.cell)
        # Not into a wall or a wrong colour: then it stays where it was.
        xy, cell = np.where(slipped[:, None], self.state[:, XY], xy), np.where(slipped, self.cell, cell)
        strides = ant_strides(self.world.noise)
        self.state = rotate_ant(strides[rng.integers(len(strides), size=B)], rng.uniform(-np.pi, np.pi, B))
        self.state[:, XY] = xy
        return self.arrive(cell)


@dataclass(frozen=True)
class AntWorld(World):
    """Ant pinpad. An observation is F = 31 + 2 (O + W) numbers, the parts of `parts` in that order."""

    decisions: int = 24  # of a spliced training episode, at most (departure); 0: training episodes are simulated
    noise: float = 0.05  # deviation of the noise on the torques while the expert walks
    spliced: bool = False  # no simulation: a step is one decision, see `SplicedBatch`

    kind, fps, tolerance, shown_every = "ant", 20, 5, 5
    BODY = 35  # numbers of a body in its own frame

    def spaces(self):
        # No number gets larger: the largest are those of an ant LARGEST metres from the centre, in half cells.
        bound = 2 * LARGEST / CELL
        observation = gym.spaces.Box(-bound, bound, (self.parts["local"].stop,), np.float32)
        return gym.spaces.Box(-1.0, 1.0, (8,), np.float32), observation

    @functools.cached_property
    def centres(self) -> np.ndarray:
        """x and y of the centre of every cell, metres, (G*G, 2)."""
        row, column = np.divmod(np.arange(self.size**2), self.size)
        return CELL * np.stack([column - (self.size - 1) / 2, (self.size - 1) / 2 - row], axis=1)

    @property
    def half(self) -> float:
        """Half the width of the grid, metres."""
        return self.size * CELL / 2

    @functools.cached_property
    def parts(self) -> dict[str, slice]:
        """Where each part of the observation lies; `PinpadEnv` says what the parts are."""
        things = 2 * (self.colours + self.walls)
        sizes = {"height": 1, "orientation": 4, "joints": 8, "velocity": 14, "xy": 2, "things": things, "local": 2}
        ends = np.cumsum([0, *sizes.values()]).tolist()
        return {name: slice(start, end) for name, start, end in zip(sizes, ends[:-1], ends[1:])}

    def cell_of(self, xy: np.ndarray) -> np.ndarray:
        """The cell of a place, the nearest one if it is off the grid, (B, 2) -> (B,)."""
        column, row = np.clip((self.half + xy * (1, -1)) // CELL, 0, self.size - 1).astype(np.int64).T
        return row * self.size + column

    def start(self, layout, tasks, rng, roam=False) -> AntBatch:
        return (SplicedBatch if self.spliced else AntBatch)(self, layout, tasks, rng, roam)

    def expert(self, batch: AntBatch, field, alive, rng):
        """Trots to the centre of the next cell -> torques (B, 8), to learn, and what to do: the same with noise."""
        way = ant_direction(batch, field, alive)
        torques = trot(batch.state, way)
        action = way if self.spliced else torques + self.noise * rng.standard_normal(torques.shape)
        return torques.astype(np.float32), action

    def episodes(self, count: int, rng: np.random.Generator) -> Episodes:
        world = replace(self, spliced=True, limit=self.decisions) if self.decisions else self
        return World.episodes(world, count, rng)

    def shuffled(self, obs: np.ndarray, rng) -> np.ndarray:
        """Each episode with its cells exchanged at random, each thing at the centre of its cell, without a body."""
        places, view = self.centres[super().shuffled(self.cells(obs), rng)] / self.half, np.zeros_like(obs)
        xy, things = places[..., -1, :], places[..., :-1, :]
        view[..., self.parts["xy"]] = xy
        view[..., self.parts["things"]] = (things - xy[..., None, :]).reshape(*obs.shape[:-1], -1)
        return view

    def is_entry(self, obs: np.ndarray) -> np.ndarray:
        """The first step, and steps that begin in another cell than the one before, (N, T)."""
        cell = self.cells(obs)[..., -1]
        return np.append(np.ones((len(obs), 1), bool), cell[:, 1:] != cell[:, :-1], axis=1)

    def cells(self, obs: np.ndarray) -> np.ndarray:
        """Cell of each colour, each wall and the ant (the nearest one if it is off the grid), (..., O + W + 1)."""
        return np.floor(self.places(obs)).clip(0, self.size - 1).astype(int) @ (1, self.size)

    def own_frame(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cells, (..., O + W + 1), and the body as the ant feels it, (..., BODY): height, tilt, joints, rates. Then,
        in the frame of the torso: velocity (symlog), place in the cell, and the directions of the centres of the cells
        above, below, left and right. These directions are the terms in which the scripted expert thinks."""
        height, orientation, joints, velocity, _, _, local = (obs[..., part] for part in self.parts.values())
        quaternion = np.sign(orientation) * np.expm1(np.abs(orientation))
        w, x, y, z = np.moveaxis(quaternion, -1, 0)
        yaw = yaw_of(quaternion)
        centres = np.array([[0, 2], [0, -2], [-2, 0], [2, 0]], dtype=obs.dtype) - local[..., None, :]
        centres /= np.linalg.norm(centres, axis=-1, keepdims=True)
        plane = np.concatenate([velocity[..., None, :2], local[..., None, :], centres], axis=-2)
        cos, sin = np.cos(yaw)[..., None], np.sin(yaw)[..., None]
        ahead, left = plane[..., 0] * cos + plane[..., 1] * sin, plane[..., 1] * cos - plane[..., 0] * sin
        turned = np.stack([ahead, left], axis=-1).reshape(*obs.shape[:-1], -1)
        tilt = np.stack([w * x + y * z, w * y - x * z], axis=-1)
        return self.cells(obs), np.concatenate([height, tilt, joints, velocity[..., 2:], turned], axis=-1)

    def places(self, obs: np.ndarray) -> np.ndarray:
        """Column and row of each colour, each wall and the ant in units of cells, (..., O + W + 1, 2)."""
        xy, things = obs[..., None, self.parts["xy"]], obs[..., self.parts["things"]]
        things = xy + things.reshape(*things.shape[:-1], -1, 2)
        return (1 + np.concatenate([things, xy], axis=-2) * (1, -1)) * self.size / 2


# ----------------------------------------------------------------------------------------------------
# The worlds (paper: Tables A1 and A2). No subgoal transition of an RL task is in its pretraining tasks.
# ----------------------------------------------------------------------------------------------------


def parse_tasks(text: str) -> tuple[tuple[int, ...], ...]:
    """'0-1-4-5 2-3-0-1' -> ((0, 1, 4, 5), (2, 3, 0, 1))."""
    return tuple(tuple(int(colour) for colour in task.split("-")) for task in text.split())


PAIRS, SINGLES = ((0, 1), (2, 3), (4, 5), (6, 7)), ((0,), (1,), (2,), (3,))
TABLE_A1 = parse_tasks(
    "0-1-4-5-0-1 0-1-4-5-2-3 0-1-6-7-2-3 2-3-0-1-4-5 2-3-6-7-2-3 2-3-6-7-4-5 4-5-0-1-4-5 4-5-0-1-6-7 "
    "4-5-2-3-6-7 6-7-2-3-0-1 6-7-2-3-6-7 6-7-4-5-0-1 0-1-6-7-4-5 2-3-0-1-6-7 4-5-2-3-0-1 6-7-4-5-2-3"
)
TABLE_A2 = parse_tasks(
    "0-3-2 1-0-3 2-1-0 3-2-1 0-2-0 0-2-1 0-3-1 1-0-2 1-3-1 1-3-2 2-0-2 2-0-3 2-1-3 3-1-0 3-1-3 3-2-0"
)
WORLDS = {
    # The paper's grid.
    "paper": GridWorld(7, 8, 4, 100, PAIRS, TABLE_A1, (0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3)),
    # A small grid of the same kind, with single colours as subgoals. Experts have the tasks of the paper's ant.
    "small": GridWorld(5, 4, 1, 100, SINGLES, TABLE_A2, (0, 1, 2, 3, 0, 1)),
    # The paper's ant; `ant-simulated` learns from simulated trajectories, as in the paper.
    "ant": AntWorld(4, 4, 1, 500, SINGLES, TABLE_A2, (0, 1, 2, 3)),
    "ant-simulated": AntWorld(4, 4, 1, 500, SINGLES, TABLE_A2, (0, 1, 2, 3), decisions=0),
}


# ----------------------------------------------------------------------------------------------------
# Gymnasium
# ----------------------------------------------------------------------------------------------------


class PinpadEnv(gym.Env):
    """Visit the coloured cells of a hidden task in order: a `Batch` of one episode.

    ## Description
    A grid of size x size cells with `colours` coloured cells and `walls` walls, each on a random cell of its own. A
    colour is visited when the agent moves onto its cell from another one. Defaults: the paper's RL tasks.
    The ant's cells are 1.25 m wide, a step is 0.05 s, and what counts is the cell of its torso's centre.

    ## Action
    Grid: Discrete(4): 0 up, 1 down, 2 left, 3 right; a move into a wall or out of the grid does nothing. Ant:
    Box(-1, 1, (8,)): torques of hip_4, ankle_4, hip_1, ankle_1, hip_2, ankle_2, hip_3, ankle_3; clipped.

    ## Observation
    Grid: 0s and 1s, (size * size * (colours + walls + 1),), row-major over cells, then a one-hot of what is there:
    colours, walls, agent. Ant: (31 + 2 n,), 41 numbers by default, where n is colours + walls:

    | index | part (`AntWorld.parts`) | meaning |
    |---|---|---|
    | 0 | height | symlog of the torso's z |
    | 1 .. 4 | orientation | symlog of the torso's quaternion w, x, y, z |
    | 5 .. 12 | joints | symlog of hip and ankle angles of legs 1, 2, 3, 4 |
    | 13 .. 26 | velocity | symlog of the torso's velocity (3), turning rates (3), joint rates (8) |
    | 27, 28 | xy | torso's x, y; the grid is [-1, 1] |
    | 29 .. 28 + 2n | things | centre of each colour, then wall, minus torso: x, y; in half grids, like xy |
    | the last 2 | local | torso's x, y in its cell; the cell is [-1, 1] |

    ## Reward, start and end
    1 when the last colour of the task is visited, else 0. Neither the task nor the visits are in the observation;
    `info["subgoal"]` is the true one, for evaluation only. Layouts may be unsolvable unless
    `reset(options={"solvable": True})`. The ant starts anywhere in its cell, with any yaw, joint angles and rates
    within 0.1 of standing still. Terminates when the task is solved, when a wrong colour is visited, and after `limit`
    steps (the limit belongs to the task); an ant's episode also when a wall is entered, when the torso is lower than
    0.2 m or higher than 1.0 m, and when the simulation diverges. Never truncates.

    ## Arguments
    render_mode ("ansi" or "rgb_array"), task (a sequence of colours), size, colours, walls, limit."""

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(self, world: str, render_mode=None, task=None, **sizes):
        if render_mode not in (None, "ansi", "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r} must be None, 'ansi' or 'rgb_array'")
        base = WORLDS[world]
        task = base.rl_task if task is None else tuple(task)
        subgoals = tuple((c,) for c in range(sizes["colours"])) if "colours" in sizes else base.subgoals
        self.world = replace(base, rl_task=task, pretrain_tasks=(task,), subgoals=subgoals, **sizes)
        self.metadata, self.render_mode = self.metadata | {"render_fps": base.fps}, render_mode
        self.action_space, self.observation_space = self.world.spaces()
        self._batch: Batch | None = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if (options or {}).get("solvable"):
            layout = solvable_layouts(self.world, [self.world.rl_task], 1, self.np_random)[0]
        else:
            layout = sample_layouts(self.world, 1, self.np_random)
        self._batch = self.world.start(layout, pad_tasks([self.world.rl_task]), self.np_random)
        return self._batch.paper_observation()[0], self._info()

    def step(self, action):
        if self._batch is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        discrete = isinstance(self.action_space, gym.spaces.Discrete)
        if np.shape(action) != self.action_space.shape or (discrete and action not in self.action_space):
            raise ValueError(f"action={action!r} must be of {self.action_space}")
        _, reward, done = self._batch.step(np.asarray(action)[None])
        return self._batch.paper_observation()[0], float(reward[0]), bool(done[0]), False, self._info()

    def render(self):
        if self._batch is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self.render_mode == "ansi":
            return grid_text(self.world, self._batch.content[0], int(self._batch.cell[0]))
        if self.render_mode == "rgb_array":
            picture = cell_picture(self.world, self._batch.content[0], 48)
            x, y = 48 * self.world.places(self._batch.observe()[0])[-1]
            row, column = np.ogrid[: len(picture), : len(picture)]
            picture[(column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 < 12**2] = 0  # the agent, a disc
            return picture

    def _info(self) -> dict:
        return {"subgoal": int(self._batch.subgoal()[0]), "visits": int(self._batch.stage[0])}


for name, world in (("Grid", "paper"), ("Ant", "ant")):
    gym.register(f"InternalRL/{name}Pinpad-v0", PinpadEnv, nondeterministic=False, kwargs={"world": world})
