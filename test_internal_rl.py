"""Tests of envs.py and internal_rl.py, in their order. Each docstring is the claim that is checked.

`python -m pytest` takes two minutes; `RUN_SLOW=1 python -m pytest -k learns` is the classroom run. References are
written here once more and as plainly as possible: breadth-first search for the expert, a sum over the tasks for the
Bayes predictor, e + U e for the controller, torch.distributions for whatever is Gaussian.
"""

import copy
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest.mock import Mock

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch.distributions import Normal, kl_divergence

import envs
import internal_rl as ir

HERE, CPU = Path(__file__).parent, torch.device("cpu")
SMALL, PAPER, ANT = (envs.WORLDS[name] for name in ("small", "paper", "ant"))
GRID_ID, ANT_ID = "InternalRL/GridPinpad-v0", "InternalRL/AntPinpad-v0"
GRIDS = pytest.mark.parametrize("world", [SMALL, PAPER], ids=["small", "paper"])
BOTH = pytest.mark.parametrize("name", ["small", "ant"])
SHORT = {"pretrain_steps": 2, "pretrain_batch": 8, "steer_steps": 2, "discover_steps": 2, "discover_batch": 8}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


# Small helpers: the inverse of symlog; expert episodes; the goals of an episode, each once as long as it lasts; a
# module's parameters, which of them are not as before, which have no gradient; a folder's files; a text; Python in
# the README; whether each key has one value and each value one key
unsymlog = lambda x: np.sign(x) * np.expm1(np.abs(x))
expert = lambda count, world=SMALL, **changes: replace(world, **changes).episodes(count, np.random.default_rng(0))
pursued = lambda goal: tuple(goal[np.flatnonzero(np.diff(goal, prepend=-2))].tolist())
copy_of = lambda module: {name: value.clone() for name, value in module.state_dict().items()}
changed = lambda module, before: {n for n, value in module.state_dict().items() if not torch.equal(before[n], value)}
without_gradient = lambda module: {n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()}
contents = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
source = lambda name: (HERE / name).read_text(encoding="utf-8")
readme_code = lambda start: re.search(rf"```python\n({start}.*?)```", source("README.md"), re.S).group(1)
one_to_one = lambda keys, values: len({*zip(keys, values)}) == len({*keys}) == len({*values})


# ---- Rules, physics and environments ---------------------------------------------------------------
TRACED = {  # task, moves, limit, roam, cells, visits (-1: none), last reward, done at the end
    "a wall, two visits": ((0, 1), "RULRR", 20, False, [4, 1, 0, 1, 2], [-1, -1, 0, -1, 1], 1, True),
    "bumping into the border is no visit": ((0, 1), "ULULR", 9, False, [1, 0, 0, 0, 1], [-1, 0, -1, -1, -1], 0, False),
    "bumping into a wall is no visit": ((1, 0), "URD", 20, False, [1, 2, 2], [-1, 1, -1], 0, False),
    "a wrong colour ends the episode": ((1, 0), "UL", 20, False, [1, 0], [-1, 0], 0, True),
    "also the colour visited last": ((0, 1), "ULRL", 20, False, [1, 0, 1, 0], [-1, 0, -1, 0], 0, True),
    "no colour does when roaming": ((1, 2), "ULRR", 20, True, [1, 0, 1, 2], [-1, 0, -1, 1], 0, False),
    "the limit ends it": ((1,), "RRR", 3, False, [4, 4, 4], [-1, -1, -1], 0, True),
    "a solution in the last step pays": ((1,), "UR", 2, False, [1, 2], [-1, 1], 1, True),
    "ant, two visits": ((0, 1), [1, 0, 1, 2], 20, False, [1, 0, 1, 2], [-1, 0, -1, 1], 1, True),
    "ant, staying on a colour is no visit": ((0, 1), [1, 0, 0, 0], 20, False, [1, 0, 0, 0], [-1, 0, -1, -1], 0, False),
    "ant, a wall ends it even when roaming": ((0, 1), [4, 5], 20, True, [4, 5], [-1, -1], 0, True),
    "ant, north of the grid it is in the nearest cell": ((1, 0), [1, (0, 30)], 20, False, [1, 1], [-1, -1], 0, False),
    "ant, east too": ((1, 2), [1, (2.5, 1.25), (-9, -9)], 20, False, [1, 2, 6], [-1, 1, 2], 1, True),
}


@pytest.mark.parametrize("name", TRACED)
def test_hand_traced_episode(name):
    """On this grid, where digits are colours, # is a wall, @ the agent, cells, visits,     0 . 1    cells: 0 1 2
    reward and end are those worked out by hand; only the last step has a reward or ends.   . @ #           3 4 5
    The ant is not moved by its legs here, but put into cells or at places off the grid.    2 . .           6 7 8"""
    task, moves, limit, roam, cells, visits, reward, done = TRACED[name]
    ant, nothing, steps = name.startswith("ant"), [0] * (len(cells) - 1), []
    layout = np.array([[0, 2, 6, 5, 4]])
    world = (envs.AntWorld if ant else envs.GridWorld)(3, 3, 1, limit, ((0,), (1,), (2,)), (task,), task)
    batch = world.start(layout, envs.pad_tasks([task]), np.random.default_rng(0), roam)
    for move in moves:
        if ant:
            place = (1.25 * (move % 3 - 1), 1.25 * (1 - move // 3)) if isinstance(move, int) else move
            batch.state[:, envs.XY] = place
        steps.append([*batch.step(np.zeros((1, 8)) if ant else np.array(["UDLR".index(move)])), batch.cell])
    expected = [visits, [*nothing, reward], [*nothing, done], cells]
    assert np.array(steps, dtype=float)[..., 0].T.tolist() == expected


@pytest.mark.parametrize("what, value, fails", [
    *((what, value, True) for what in ("velocity", "torque") for value in (np.nan, np.inf)),
    ("velocity", 1e4, True), ("torque", 1e4, False),
    ("height", 0.19, True), ("height", 0.21, False), ("height", 0.99, False), ("height", 1.01, True),
])  # fmt: skip
def test_failing_ends_one_episode(what, value, fails, tmp_path, monkeypatch):
    """State or torques that are not finite, a state too large, a torso outside [0.2, 1.0] m end that episode, even on
    the goal without reward; the others do not notice. Observations stay finite. A merely large torque is clipped."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it stands
    sick, well, torques = random_batch(ANT, 3, (0,)), random_batch(ANT, 3, (0,)), np.zeros((3, 8))
    if what == "height":  # time stops, so that the torso stays there
        monkeypatch.setattr(envs, "ant_simulate", lambda state, torques, threads: state)
    well.step(torques)
    sick.state[1, envs.XY] = ANT.centres[sick.things[1, 0]]
    if what == "torque":
        torques[1, 3] = value
    else:
        sick.state[1, envs.HEIGHT if what == "height" else 20] = value
    _, reward, done = sick.step(torques)
    assert done.tolist() == [False, True, False] and reward.tolist() == [0, not fails, 0]
    assert np.isfinite(sick.observe()).all()
    assert np.array_equal(sick.state[[0, 2]], well.state[[0, 2]])


def random_batch(world, count=6, task=None) -> envs.Batch:
    """`count` episodes on random layouts, solvable or not; always the same ones."""
    rng = np.random.default_rng(0)
    layout = envs.sample_layouts(world, count, rng)
    return world.start(layout, envs.pad_tasks([task or world.rl_task] * count), rng)


@pytest.mark.parametrize("world", [SMALL, replace(ANT, threads=2)], ids=["small", "ant"])
def test_batch_equals_single_episodes_and_select_keeps_them(world):
    """Six episodes together, then three of them after `select`, go as each one alone; with ants on two threads."""
    rng, kept = np.random.default_rng(2), np.array([4, 0, 3])
    actions = rng.integers(4, size=(8, 6)) if world is SMALL else rng.uniform(-1, 1, (8, 6, 8))
    batch, alone = random_batch(world), [random_batch(replace(world, threads=1)) for _ in range(6)]
    for i, single in enumerate(alone):
        single.select([i])
    for t in range(8):
        if t == 4:
            batch.select(kept)
        rows = np.arange(6) if t < 4 else kept
        together = np.array(batch.step(actions[t, rows]))
        assert np.array_equal(together, np.concatenate([alone[i].step(actions[t, [i]]) for i in rows], axis=1))
        assert np.array_equal(batch.observe(), np.concatenate([alone[i].observe() for i in rows]))
        assert np.array_equal(batch.subgoal(), np.concatenate([alone[i].subgoal() for i in rows]))


def test_ant_observation_shows_everything_but_the_goal():
    """Each part of the observation is what the table says, worked out here from state and layout; tasks look alike."""
    first, last = random_batch(ANT, 5, ANT.pretrain_tasks[0]), random_batch(ANT, 5, ANT.rl_task)
    obs, parts = first.observe(), ANT.parts
    assert np.array_equal(obs, last.observe()) and obs.shape == (5, 41) and obs.dtype == np.float32
    assert [part.start for part in parts.values()] + [41] == [0, 1, 5, 13, 27, 29, 39, 41]
    assert np.allclose(unsymlog(obs[:, :27]), first.state[:, 3:], rtol=1e-4, atol=1e-5)
    for i, (x, y) in enumerate(first.state[:, envs.XY]):
        assert np.allclose(obs[i, parts["xy"]], (x / 2.5, y / 2.5), atol=1e-6)
        assert np.allclose(obs[i, parts["local"]], (2 * (x / 1.25 % 1) - 1, 2 * (y / 1.25 % 1) - 1), atol=1e-5)
        for thing, cell in zip(obs[i, parts["things"]].reshape(5, 2), first.things[i]):
            place = 1.25 * (cell % 4) - 1.875, 1.875 - 1.25 * (cell // 4)
            assert np.allclose(thing, ((place[0] - x) / 2.5, (place[1] - y) / 2.5), atol=1e-6)


def test_task_tables_are_the_papers():
    """Tables A1 and A2 verbatim, the paper's sizes, and no post-training transition occurs in pretraining."""
    table_a1 = """0-1-4-5-0-1 0-1-4-5-2-3 0-1-6-7-2-3 2-3-0-1-4-5 2-3-6-7-2-3 2-3-6-7-4-5 4-5-0-1-4-5 4-5-0-1-6-7
        4-5-2-3-6-7 6-7-2-3-0-1 6-7-2-3-6-7 6-7-4-5-0-1 0-1-6-7-4-5 2-3-0-1-6-7 4-5-2-3-0-1 6-7-4-5-2-3"""
    table_a2 = "0-3-2 1-0-3 2-1-0 3-2-1 0-2-0 0-2-1 0-3-1 1-0-2 1-3-1 1-3-2 2-0-2 2-0-3 2-1-3 3-1-0 3-1-3 3-2-0"
    for world, table in ((PAPER, table_a1), (SMALL, table_a2), (ANT, table_a2)):
        assert ["-".join(map(str, task)) for task in world.pretrain_tasks] == table.split()
        shown = set().union(*(world.transitions(task) for task in world.pretrain_tasks))
        assert len(shown) >= 7 and not shown & world.transitions(world.rl_task)
    sizes = [(w.size, w.colours, w.walls, w.limit, w.tolerance, w.jumps) for w in (PAPER, ANT)]
    assert sizes == [(7, 8, 4, 100, 1, 0), (4, 4, 1, 500, 5, 0)]
    assert envs.WORLDS["ant-simulated"] == replace(ANT, decisions=0) and ANT.rl_task == (0, 1, 2, 3)
    assert "-".join(map(str, PAPER.rl_task)) == "0-1-2-3-4-5-6-7-0-1-2-3" and PAPER.counting_success == 4**-6
    assert PAPER.transitions(PAPER.rl_task) == {(0, 1), (1, 2), (2, 3), (3, 0)}
    assert SMALL.transitions((0, 2, 1)) == {(0, 2), (2, 1)} and SMALL.counting_success == 4**-6
    assert PAPER.subgoal_of(np.array([0, 1, 2, 7, -1])).tolist() == [0, 0, 1, 3, -1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, world, width", [(GRID_ID, PAPER, 637), (ANT_ID, ANT, 41)])
def test_default_env_is_the_papers_and_seeded(name, world, width):
    """gym.make without arguments is the paper's post-training task. A seed decides the whole episode and the next one,
    reset without a seed; another seed gives others. Gymnasium's own checker has no complaint and no warning."""
    env, rng = gymnasium.make(name), np.random.default_rng(0)
    assert replace(world, pretrain_tasks=(world.rl_task,)) == env.unwrapped.world
    moves = rng.integers(4, size=8) if world is PAPER else rng.uniform(-1, 1, (8, 8)).astype(np.float32)
    episodes = [[env.reset(seed=seed)[0], *(env.step(a)[0] for a in moves), env.reset()[0]] for seed in (3, 3, 4)]
    first, same, other = np.array(episodes)
    assert first.shape == (10, width) and np.array_equal(first, same) and not np.array_equal(first, other)
    for mode in (None, "ansi", "rgb_array"):
        check_env(gymnasium.make(name, render_mode=mode).unwrapped)


@pytest.mark.parametrize("name", [GRID_ID, ANT_ID])
def test_env_is_the_view_of_a_batch_of_one(name):
    """The env's observations, rewards and ends are those of its batch with the same actions, in the types that
    Gymnasium wants; a solved task pays 1. The grid's observation is (G, G, O + W + 1) row-major: each colour, each
    wall and the agent has a single 1, at its cell."""
    env = gymnasium.make(name, size=3, colours=3, walls=1, limit=100, task=(0, 2) if name == GRID_ID else (0,))
    rng, rewards = np.random.default_rng(0), set()
    for seed in range(20):
        env.reset(seed=seed, options={"solvable": True})
        batch, over = copy.deepcopy(env.unwrapped._batch), False
        field = envs.distance_fields(batch.world, np.append(batch.things, batch.cell[:, None], axis=1))
        while not over:
            action = batch.world.expert(batch, field, np.arange(1), rng)[1]
            if rng.random() < 0.25:  # not the expert
                action = rng.integers(4, size=1) if name == GRID_ID else rng.uniform(-1, 1, (1, 8))
            obs, reward, over, truncated, info = env.step(action[0])
            _, expected, done = batch.step(action)
            assert (reward, over, info["subgoal"]) == (expected[0], done[0], batch.subgoal()[0])
            assert env.observation_space.contains(obs) and truncated is False
            if name == GRID_ID:
                assert np.argwhere(obs.reshape(9, 5).T).tolist() == [*map(list, enumerate(batch.observe()[0]))]
                assert np.array_equal(batch.observe()[0], [*batch.things[0], *batch.cell])
            else:
                assert np.array_equal(obs, batch.observe()[0])
        rewards.add(reward)
    assert rewards == {0.0, 1.0} and type(reward) is float and type(over) is bool


@pytest.mark.parametrize("make, good, bad", [("paper", 0, 4), ("ant", np.zeros(8), np.zeros(7))])
def test_misuse_is_refused(make, good, bad):
    """An argument that makes no grid or no task is a ValueError that names it, an action that is none too; stepping or
    rendering before reset is Gymnasium's ResetNeeded."""
    wrong = [("size", 1), ("colours", 0), ("walls", -1), ("walls", 99), ("limit", 0), ("render_mode", "human")]
    for name, value in (*wrong, ("task", (0, 8)), ("task", ()), ("task", (0, 0))):
        with pytest.raises(ValueError, match=name):
            envs.PinpadEnv(make, **{name: value})
    for goals in (((0, 1), (2,), (3,)), ((0,), (1,)), ((0,), (0,), (1,))):  # unequal, some colour missing, one twice
        with pytest.raises(ValueError, match="subgoals"):
            replace(SMALL, subgoals=goals)
    env = envs.PinpadEnv(make)
    for call in (lambda: env.step(good), env.render):
        with pytest.raises(gymnasium.error.ResetNeeded):
            call()
    env.reset(seed=0)
    env.step(good)
    with pytest.raises(ValueError, match="action"):
        env.step(bad)


# ---- The grid's expert, against breadth-first search -----------------------------------------------
def walk(size, cell, action):
    """The cell that an action leads to on an empty grid; the border stops it."""
    row, column = cell // size + (-1, 1, 0, 0)[action], cell % size + (0, 0, -1, 1)[action]
    return row * size + column if 0 <= row < size and 0 <= column < size else cell


@functools.lru_cache(100_000)
def search(size, obstacles, goal):
    """Breadth-first search: {cell: steps to the goal} of the cells with a way to it."""
    found, queue = {goal: 0}, [goal]
    for cell in queue:
        for after in (walk(size, cell, action) for action in range(4)):
            if after not in found and after not in obstacles:
                found[after] = found[cell] + 1
                queue.append(after)
    return found


def unpadded(world, episodes):
    """Of each episode obs, target, goal and the colours pursued: the beginning of a task. The padding is 0 and -1."""
    for obs, target, goal, mask in zip(*episodes):
        steps, task = int(mask.sum()), pursued(goal[mask])
        assert mask[:steps].all() and (goal[steps:] == -1).all() and not target[steps:].any()
        assert not obs[steps + 1 :].any() and any(whole[: len(task)] == task for whole in world.pretrain_tasks)
        yield obs[: steps + 1], target[:steps], goal[:steps], task


def best_moves(world, things, agent, goal):
    """Uniform over the moves that start a shortest path to colour `goal`, (4,); zeros where there is no path."""
    obstacles = frozenset(int(cell) for cell in things) - {int(things[goal])}
    steps = search(world.size, obstacles, int(things[goal]))
    after = [walk(world.size, int(agent), action) for action in range(4)]
    reach = np.array([steps.get(cell, math.inf) if cell != agent else math.inf for cell in after])
    best = (reach == reach.min()) & (reach < math.inf)
    return best / max(1, best.sum())


def can_be_solved(world, things, agent, task):
    places = [agent, *(things[goal] for goal in task)]
    return all(best_moves(world, things, place, goal).any() for place, goal in zip(places, task))


@GRIDS
@pytest.mark.parametrize("jumps", [0.0, 0.2])
def test_grid_expert(world, jumps):
    """Targets are moves along shortest paths to the goal, those that are made; of two each is made equally often. The
    walk starts on a free cell, visits the colours of its task and no other, and ends with the last. With `jumps`, and
    only then, steps lead elsewhere, to free cells. All chance comes from the generator that is passed in."""
    chance, n, firsts = str(np.random.get_state()), {"jumps": 0, "steps": 0}, []
    for obs, target, goal, task in unpadded(world, expert(60, world, jumps=jumps)):
        things, agent, visits = obs[0, :-1].tolist(), obs[:, -1].tolist(), ()
        colours = things[: world.colours]
        assert (obs[:, :-1] == obs[0, :-1]).all() and agent[0] not in things
        for t in range(len(goal)):
            best = best_moves(world, things, agent[t], goal[t])
            assert best[target[t]] > 0 and goal[t] == task[len(visits)]
            firsts += [agent[t + 1] == walk(world.size, agent[t], best.argmax())] if 2 * best.max() == 1 else []
            if agent[t + 1] != walk(world.size, agent[t], target[t]):
                n["jumps"] += 1
                assert agent[t + 1] not in things
            elif agent[t + 1] in things:
                assert agent[t + 1] == colours[goal[t]]
                visits += (goal[t],)
        assert visits == task
        n["steps"] += len(goal) - len(task)  # no visit is followed by a jump
    if jumps:
        assert 0.1 < n["jumps"] / n["steps"] < 0.25
    else:
        assert n["jumps"] == 0 and abs(np.mean(firsts) - 0.5) < 4 * 0.5 / math.sqrt(len(firsts))
    assert chance == str(np.random.get_state())


@GRIDS
def test_solvability_is_exact(world):
    """`solvable` is right on every layout; `World.batch` has solvable ones only, the agent on no colour."""
    rng = np.random.default_rng(1)
    layout, task = envs.sample_layouts(world, 400, rng), rng.integers(16, size=400)
    found = envs.solvable(envs.distance_fields(world, layout), layout, envs.pad_tasks(world.pretrain_tasks)[task])
    pairs = zip(layout, task)
    expected = [can_be_solved(world, cells[:-1], cells[-1], world.pretrain_tasks[number]) for cells, number in pairs]
    assert found.tolist() == expected and 0.5 < np.mean(expected) < 1
    batch = world.batch(100, rng)
    for things, cell, task in zip(batch.things, batch.cell, batch.tasks):
        assert cell not in things and can_be_solved(world, things, cell, world.rl_task)
        assert tuple(task[:-1]) == world.rl_task


def bayes_by_hand(world, obs, steps):
    """The Bayes predictor of an episode, task by task: replay it under each task and weigh the tasks' experts."""
    tasks, things, agent, visits = world.pretrain_tasks, obs[0, :-1].tolist(), obs[:, -1], ()
    weight = np.array([float(can_be_solved(world, things, agent[0], task)) for task in tasks])
    predictions = experts = []
    for t in range(steps):
        if t:  # the move that has led here, and what it visited
            weight = weight * experts[:, [walk(world.size, agent[t - 1], a) for a in range(4)].index(agent[t])]
            visits += (things.index(agent[t]),) if agent[t] in things else ()
        # Only tasks with these visits go on, and a solved one ends the episode.
        weight = weight * [len(task) > len(visits) and task[: len(visits)] == visits for task in tasks]
        goals = [task[len(visits)] if w else 0 for task, w in zip(tasks, weight)]
        experts = np.stack([best_moves(world, things, agent[t], goal) for goal in goals])
        predictions = [*predictions, weight @ experts / weight.sum()]
    return np.stack(predictions)


@pytest.mark.parametrize("world", [
    SMALL, PAPER, replace(SMALL, pretrain_tasks=((0, 1), (0, 1, 2), (0, 3, 1), (2, 0, 3), (2, 0)))
], ids=["small", "paper", "some tasks are beginnings of others"])  # fmt: skip
def test_bayes_predictor_equals_brute_force(world):
    """The predictor equals the sum over all tasks of p(task | moves so far) times that task's expert; the floor is its
    loss, summed over steps and averaged over episodes."""
    data, losses = expert(24, world), []
    found = envs.bayes_predictor(world, data)
    for i, steps in enumerate(data.lengths):
        expected = bayes_by_hand(world, data.obs[i], steps)
        assert np.allclose(found[i, :steps], expected, atol=1e-6) and not found[i, steps:].any()
        losses.append(-np.log(expected[np.arange(steps), data.target[i, :steps]]).sum())
    assert world.floor(data) == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_copy_of_a_grid_has_its_cells_shuffled():
    """One permutation of the cells for all steps and objects of an episode, another for the next; each cell goes
    everywhere equally often. On the grid every step is an entry."""
    obs = expert(64).obs[:, :4]
    view = SMALL.shuffled(obs, np.random.default_rng(0))
    assert all(one_to_one(before.ravel(), after.ravel()) for before, after in zip(obs, view))
    counts = np.bincount(SMALL.shuffled(np.full((2500, 1, 1), 7), np.random.default_rng(0)).ravel(), minlength=25)
    assert np.abs(counts - 100).max() < 5 * 10 and SMALL.is_entry(obs).all()
    assert SMALL.places(np.array([[0, 7, 24]])).tolist() == [[[0.5, 0.5], [2.5, 1.5], [4.5, 4.5]]]


@BOTH
def test_held_out_episodes(name, monkeypatch):
    """Evaluation episodes are the same for every seed of a run and whatever the training data is like; no run's
    training can have drawn them, as the seeds of its streams are below 10^9 and not shared; they have no jumps, and
    the ant's are simulated. Nearly always, on the grid always, the expert solves the post-training task too."""
    monkeypatch.setattr(np.random, "default_rng", spy := Mock(wraps=np.random.default_rng))
    changes = {"jumps": 0.4}, {"jumps": 0.0}
    runs = [ir.Run(ir.Config(world=name, eval_episodes=16, **c), seed, CPU) for seed, c in enumerate(changes)]
    first, second = (run.held_out for run in runs)
    assert all(np.array_equal(a, b) for a, b in zip(first, second)) and len(first.mask) == 16
    seeds, streams = [call.args[0] for call in spy.call_args_list], ir.STREAMS.values()
    assert seeds and min(seeds) > 1000 * 999_999 + max(streams) and len(set(streams)) == len(streams)
    step = np.abs(np.diff(runs[0].world.places(first.obs)[..., -1, :], axis=1)).sum(axis=-1)[first.mask]
    assert step.max() == 1 if name == "small" else 0.01 < step.max() < 0.3  # cells
    assert runs[0].world.expert_success(16) == 1 if name == "small" else 0.8 <= ANT.expert_success(16) <= 1


def test_simulation_is_five_plain_steps():
    """One control step is five mj_step of 0.01 s with the torques held and clipped, actuators leg 4 first."""
    import mujoco

    model = envs.ant_physics(1)[0]
    joints = [model.joint(model.actuator_trnid[i, 0]).name for i in range(8)]
    assert joints == [f"{part}_{leg}" for leg in (4, 1, 2, 3) for part in ("hip", "ankle")]
    state, torques = random_batch(ANT).state, np.random.default_rng(1).uniform(-2, 2, (6, 8))
    for before, torque, after in zip(state, torques, envs.ant_simulate(state, torques)):
        data = mujoco.MjData(model)
        data.qpos, data.qvel, data.ctrl = before[1:16], before[16:], torque.clip(-1, 1)
        for _ in range(5):
            mujoco.mj_step(model, data)
        assert np.allclose([data.time, *data.qpos, *data.qvel], after, atol=1e-9) and after[0] == pytest.approx(0.05)


def test_start_is_as_the_paper_says():
    """Colours, walls and agent on different cells, each equally often on each. The ant is anywhere in its cell, any
    yaw, joints and rates within 0.1 of standing (ankles 1 rad out), at rest."""
    batch = random_batch(ANT, 2000)
    cells = np.append(batch.things, ANT.cell_of(batch.state[:, envs.XY])[:, None], axis=1)
    assert np.array_equal(cells[:, -1], batch.cell) and (np.diff(np.sort(cells, axis=1), axis=1) > 0).all()
    assert all(np.abs(np.bincount(cell, minlength=16) - 125).max() < 5 * math.sqrt(125) for cell in cells.T)
    standing = np.tile([0, 1, 0, -1, 0, -1, 0, 1], (2000, 1))
    spread = [batch.observe()[:, ANT.parts["local"]], envs.yaw_of(batch.state[:, envs.QUATERNION])[:, None] / np.pi]
    spread += [(batch.state[:, envs.JOINTS] - standing) / 0.1, batch.state[:, envs.JOINT_RATES] / 0.1]
    for part in spread:  # uniform on [-1, 1]: mean 0, variance 1/3, within 5 standard deviations
        assert np.abs(part).max() <= 1 and np.abs(part.mean(axis=0)).max() < 5 * (1 / 3 / 2000) ** 0.5
        assert np.abs((part**2).mean(axis=0) - 1 / 3).max() < 5 * (4 / 45 / 2000) ** 0.5
    assert not batch.state[:, 16:22].any() and (batch.state[:, envs.HEIGHT] == 0.55).all()


# ---- The ant's expert ------------------------------------------------------------------------------
def ant_cells(obs):
    """Observations of an ant (T, 41) -> its cell at each step (T,), the cells of the colours and the wall (5,)."""
    xy = obs[:, 27:29].astype(float) * 2.5
    places = np.concatenate([xy, xy[0] + obs[0, 29:39].reshape(5, 2) * 2.5])
    cells = np.clip((2.5 - places[:, 1]) // 1.25, 0, 3) * 4 + np.clip((places[:, 0] + 2.5) // 1.25, 0, 3)
    return cells[:-5].astype(int), cells[-5:].astype(int)


@functools.cache
def simulated(noise=0.0, limit=500, count=50):
    return replace(ANT, noise=noise, limit=limit).simulate(ANT.pretrain_tasks, count, np.random.default_rng(0))


def test_the_ants_expert_walks_along_shortest_paths():
    """It walks to the centre of a next cell on a shortest path to its goal; where there is no way, of its own cell."""
    batch = random_batch(ANT, 400)
    layout = np.append(batch.things, batch.cell[:, None], axis=1)
    way = envs.ant_direction(batch, envs.distance_fields(ANT, layout), np.arange(400))
    for things, cell, goal, xy, angle in zip(batch.things, batch.cell, batch.goal(), batch.state[:, envs.XY], way):
        moves = best_moves(ANT, things, cell, goal)
        allowed = [walk(4, cell, action) for action in np.flatnonzero(moves)] if moves.any() else [cell]
        towards = [np.arctan2(*(ANT.centres[after] - xy)[::-1]) for after in allowed]
        assert np.isclose(towards, angle).any()


@pytest.mark.parametrize("direction", [0.0, 2.0, -2.5])
def test_trot_goes_where_it_should(direction):
    """In 5 seconds an ant of any yaw walks 1.5 m or more in the direction asked for, within 0.3 rad, upright. Stored
    moments of walking are turned so that all but those that have just turned move along x, whatever they face."""
    batch = random_batch(ANT, 8)
    start = batch.state[:, envs.XY].copy()
    for _ in range(100):
        batch.state = envs.ant_simulate(batch.state, envs.trot(batch.state, np.full(8, direction)))
    dx, dy = (batch.state[:, envs.XY] - start).T
    assert np.hypot(dx, dy).min() > 1.5 and batch.upright().all()
    assert np.abs(np.angle(np.exp(1j * (np.arctan2(dy, dx) - direction)))).max() < 0.3
    state = envs.ant_strides(0.05)
    assert state.shape == (16_384, 30) and (state[:, 5:7] ** 2).sum(axis=1).max() < 0.5
    yaw = envs.yaw_of(state[:, envs.QUATERNION])
    assert np.median(state[:, 16]) > 0.5 and abs(np.median(state[:, 17])) < 0.1 and np.ptp(yaw) > 6


@pytest.mark.parametrize("noise, limit, count, least", [(0.0, 500, 50, 0.9), (0.1, 500, 50, 0.9), (0.05, 150, 9, 0.1)])
def test_ant_expert_solves_its_tasks(noise, limit, count, least):
    """At least 9 of 10 episodes succeed, fewer with little time; each visits, by its recorded places alone, just the
    first colours of its task in order and no wall, pursues them in that order, and is kept up to the last of them. The
    padding is zeros and -1; the same generator gives the same episodes again."""
    (data, success), again = simulated(noise, limit, count), simulated.__wrapped__(noise, limit, count)[0]
    assert least <= success <= (0.7 if limit < 500 else 1) and all(np.array_equal(a, b) for a, b in zip(data, again))
    assert len(data.mask) == count
    for obs, _, _, task in unpadded(ANT, data):
        cells, things = ant_cells(obs)
        entered = cells[1:][np.diff(cells) != 0].tolist()
        assert things[4] not in entered and cells[-1] == things[task[-1]]
        assert [cell for cell in entered if cell in things] == [things[goal] for goal in task]


@pytest.mark.parametrize("jumps", [0.0, 0.8])
def test_spliced_ants(jumps):
    """Spliced episodes pursue a task in order and end with a visit. They start on a free cell and never touch a wall,
    nor another colour than the goal, jumps or not; no step but a jump is longer than to the next cell; how the body
    moves tells nothing of where the ant went."""
    far, forward, shorter = 0, [], 0
    for obs, target, goal, _ in unpadded(ANT, expert(80, ANT, jumps=jumps)):
        cells, things = ant_cells(obs)
        visited = cells[1:] == things[goal]
        assert target.any(axis=1).all() and np.array_equal(np.diff(goal) != 0, visited[:-1]) and visited[-1]
        entered = (cells[1:] != cells[:-1]) & np.isin(cells[1:], things)
        assert (entered <= visited).all() and things[4] not in cells and cells[0] not in things
        shorter += len(goal) < ANT.decisions
        move = np.diff(obs[:, ANT.parts["xy"]], axis=0) * 2.5
        pace, velocity = np.hypot(*move.T), unsymlog(obs[1:, 13:15])
        far, forward = far + (pace > 1.5).sum(), [*forward, *(velocity * move).sum(axis=1)[pace > 0]]
    assert 0.4 < (np.array(forward) > 0).mean() < 0.6 and 0 < shorter < 80
    assert far > 100 if jumps else far == 0


@pytest.mark.parametrize("spliced", [True, False])
def test_recorded_torques_are_the_experts(spliced, monkeypatch):
    """What is recorded is the trot of the very state that is observed, towards the centre of the next cell. What is
    executed, where that is simulated, has noise of the asked for deviation added, drawn anew each step."""
    world, trot, direct, simulate = replace(ANT, noise=0.1), envs.trot, envs.ant_direction, envs.ant_simulate
    strides = envs.ant_strides(0.1, 1000)  # made before anything is spied on
    monkeypatch.setattr(envs, "ant_strides", lambda noise: strides)
    calls, rows, executed, seen = [], [], [], 0
    monkeypatch.setattr(envs, "ant_direction", lambda *a: rows.append(a[2].copy()) or direct(*a))
    monkeypatch.setattr(envs, "trot", lambda *a: calls.append((a[0].copy(), a[1].copy(), trot(*a))) or calls[-1][2])
    monkeypatch.setattr(envs, "ant_simulate", lambda *a: executed.append(a[1].copy()) or simulate(*a))
    count, world = (60, replace(world, spliced=True, limit=24)) if spliced else (8, world)
    data, _ = world._simulate_chunk(ANT.pretrain_tasks, count, np.random.default_rng(0), 0.5 * spliced)
    for t, (alive, (state, way, torques)) in enumerate(zip(rows, calls)):
        live = data.mask[alive, t]
        obs = data.obs[alive[live], t]
        assert np.array_equal(data.target[alive[live], t], torques[live].astype(np.float32))
        assert np.allclose(unsymlog(obs[:, :27]), state[live, 3:], atol=1e-3)
        steps = 1.25 * np.array([[0, 1], [0, -1], [-1, 0], [1, 0]]) - obs[:, None, ANT.parts["local"]] * 0.625
        off = np.exp(1j * (np.arctan2(steps[..., 1], steps[..., 0]) - way[live, None]))
        assert (np.abs(np.angle(off)).min(axis=1) < 1e-3).mean() > 0.99
        seen += live.sum()
    assert data.mask.sum() == seen and len(executed) == (0 if spliced else len(calls))
    if not spliced:
        noise = [b - a for (_, _, a), b in zip(calls, executed)]
        whole = np.array([n.ravel() for n in noise if len(n) == 8])  # while all are alive
        assert np.concatenate(noise).std() == pytest.approx(0.1, rel=0.05) and len(whole) > 60
        assert abs(np.corrcoef(whole[:-1].ravel(), whole[1:].ravel())[0, 1]) < 0.1


def test_what_the_encoder_reads_of_an_ant():
    """The copy of an episode has its cells shuffled as a whole, everything at the centre of its cell, the body hidden.
    An entry is a step onto another cell than before, as the batch counts cells, off the grid too; so is the first."""
    obs = simulated()[0].obs[:, :20]
    view = ANT.shuffled(obs, np.random.default_rng(0))
    assert view.dtype == np.float32 and not view[..., :27].any() and not view[..., 39:].any()
    for before, after in zip(obs, view):
        (cell, things), (moved, objects) = ant_cells(before), ant_cells(after)
        assert one_to_one([*cell, *things], [*moved, *objects])
        assert np.allclose(after[:, 27:29] * 2.5, ANT.centres[moved], atol=1e-5)
    for found, episode in zip(ANT.is_entry(simulated()[0].obs), simulated()[0].obs):
        assert np.array_equal(found, np.append(True, np.diff(ant_cells(episode)[0]) != 0))
    batch = random_batch(ANT, 200)
    batch.state[:60, 1] += np.linspace(0, 4, 60)
    batch.cell = ANT.cell_of(batch.state[:, envs.XY])
    places = ANT.places(batch.observe())  # column and row
    assert np.allclose(places[:, :5], np.stack([batch.things % 4, batch.things // 4], axis=-1) + 0.5, atol=1e-5)
    assert np.allclose(places[:, 5], (batch.state[:, envs.XY] * (1, -1) + 2.5) / 1.25, atol=1e-5)
    assert np.array_equal(ANT.is_entry(batch.observe()[None])[0], np.append(True, np.diff(batch.cell) != 0))


# ---- Models, losses and phases ---------------------------------------------------------------------
def make_run(**changes) -> ir.Run:
    sizes = {"layers": 3, "dim": 16, "mlp": 24, "rank": 3, "code_dim": 4, "policy_dim": 16}
    return ir.Run(replace(ir.Config(), eval_episodes=16, **(sizes | changes)), 0, CPU)


def wake(module, std=0.3):
    """Add noise to all parameters, so that no path is shut by its initial zeros."""
    for parameter in module.parameters():
        parameter.data += std * torch.randn(parameter.shape)
    return module


@BOTH
@pytest.mark.parametrize("blind_blocks, relative", [(0, True), (0, False), (1, True), (3, True)])
def test_base_is_causal_and_steps(name, blind_blocks, relative):
    """Changing the observations from step 5 on changes the features there and none before; step by step they are
    those of the whole sequence. In a blind episode, and in blind blocks, each step is an episode of its own; beside
    it, the others are read as ever. After an opening of the gate at step 4, those after it are an episode."""
    run = make_run(world=name, blind_blocks=blind_blocks, relative_obs=relative)
    base = wake(ir.BaseModel(run.config), 0.1).double()
    obs = torch.from_numpy(run.world.episodes(4, np.random.default_rng(0)).obs[:, :9])
    obs = obs if name == "small" else obs.double()
    other, whole, outputs, lower, upper = obs.clone(), base(obs), [], None, None
    other[:, 5:, -1] = (obs[:, 5:, -1] + 7) % 25 if name == "small" else obs[:, 5:, -1] + 0.2
    difference = (base(other) - whole).abs().amax(dim=(0, 2))
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()
    for t in range(9):
        residual, lower = base.lower(obs[:, t : t + 1], past=lower)
        y, upper = base.upper(residual, past=upper)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, dim=1), whole, atol=1e-9)
    blind = torch.tensor([True, False, True, False])[:, None, None]
    faded = torch.where(blind[..., 0], ir.each_alone(obs), 0.0)
    lower = lambda obs, faded=None: base.lower(obs, faded)[0]
    for read, memory in ((lower, not blind_blocks), (lambda *a: base.upper(lower(*a), *a[1:])[0], blind_blocks < 3)):
        whole, alone = read(obs), torch.cat([read(obs[:, [t]]) for t in range(9)], dim=1)
        assert torch.allclose(read(obs, faded), torch.where(blind, alone, whole), atol=1e-9)
        assert torch.isclose(alone, whole).all(dim=-1)[:, 1:].any() != memory
    faded = 100 * ir.forget_at((torch.arange(9).expand(4, 9) == 4).double())  # times 100: without a rest
    expected = torch.cat([read(obs[:, :4]), alone[:, [4]], read(obs[:, 5:])], dim=1)
    assert torch.allclose(read(obs, faded), expected, atol=1e-9)


def test_gate_that_opens_forgets():
    """After an opening of the gate a step remembers the steps after it, and next to nothing of the opening and before.
    A gate that is half open forgets by three quarters within two steps. What is forgotten has a gradient."""
    gate = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0.5, 0]], requires_grad=True)
    faded = ir.forget_at(gate)
    faded[0, 7].backward()
    assert gate.grad[0, 3] < 0 and gate.grad[0, 6] < 0
    remembered = torch.exp(faded[0, :, None] - faded[0]).tril().detach()
    expected = torch.eye(8)
    expected[2, 1] = expected[5, 4] = 1
    expected[6, [4, 5]] = expected[7, 6] = 0.5
    expected[7, [4, 5]] = 0.25
    assert torch.allclose(remembered, expected, atol=2e-4)


def test_grid_embeddings():
    """Absolute: the env's observation of 637 numbers times one weight matrix. Relative: shifting everything by one row
    changes only the agent's own term, exchanging two walls nothing; exchanging two colours, or moving one, does."""
    embed, batch = ir.AbsoluteCells(make_run(relative_obs=False).config, PAPER), random_batch(PAPER)
    weight = embed.weight.unflatten(0, (13, 49)).transpose(0, 1).flatten(0, 1)  # (object, cell) -> (cell, object)
    expected = torch.from_numpy(batch.paper_observation()) @ weight
    assert torch.allclose(embed(torch.from_numpy(batch.observe())), expected, atol=1e-5)
    embed = wake(ir.RelativeCells(PAPER, 16))
    cells = torch.tensor([[[0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32, 33]]])  # 8 colours, 4 walls, agent
    walls, colours, moved = cells.clone(), cells.clone(), cells.clone()
    walls[..., [8, 9]], colours[..., [0, 1]], moved[..., 0] = cells[..., [9, 8]], cells[..., [1, 0]], 3
    assert torch.allclose(embed(cells + 7) - embed.agent[40], embed(cells) - embed.agent[33], atol=1e-5)
    assert torch.allclose(embed(walls), embed(cells), atol=1e-5)
    assert not any(torch.allclose(embed(other), embed(cells), atol=1e-2) for other in (colours, moved))


def test_ant_embedding_knows_the_cells():
    """The cells that the ant's embedding reads off an observation are those of the batch, on and off the grid; and
    what it sees of the body does not change when the whole world is turned by half a turn."""
    embed, batch, other = ir.RelativeAnt(make_run().config, ANT), random_batch(ANT, 200), random_batch(ANT, 200)
    batch.state = envs.ant_simulate(batch.state, np.random.default_rng(1).uniform(-1, 1, (200, 8)))
    batch.state[:20, 1] += 4
    batch.cell = ANT.cell_of(batch.state[:, envs.XY])
    other.state, other.things = envs.rotate_ant(batch.state, np.full(200, np.pi)), 15 - batch.things
    other.state[:, envs.XY], other.cell = -batch.state[:, envs.XY], 15 - batch.cell
    embed.body.weight.data[:, -8:] = 0  # the directions of the cells above, below, left and right change places
    cells, bodies = [], []
    embed.cells.register_forward_pre_hook(lambda module, arguments: cells.append(arguments[0].numpy()))
    embed.body.register_forward_hook(lambda module, arguments, output: bodies.append(output))
    for seen in (batch, other):
        embed(torch.from_numpy(seen.observe()))
        assert np.array_equal(cells[-1], np.concatenate([seen.things, seen.cell[:, None]], axis=1))
    assert torch.allclose(*bodies, atol=1e-4) and bodies[0].std() > 0.1


def padded_episodes(name):
    """12 short expert episodes, with the padding of a longer one. What stands in it must change no loss."""
    episodes = expert(40, envs.WORLDS[name])
    short = envs.Episodes(*(column[np.argsort(episodes.lengths, kind="stable")[:12]] for column in episodes))
    assert short.take(slice(None)).mask.shape[1] == short.lengths.max() < short.mask.shape[1] - 1
    short.target[~short.mask] = 1
    short.obs[:, 1:][~short.mask] = short.obs[0, 0]
    return short


@BOTH
def test_pretraining_loss_by_hand(name):
    """The loss is -ln p of the expert's action plus obs_loss times that of the next observation, summed over the real
    steps, whatever stands in the padding, and averaged over episodes. Every parameter of the base has a gradient,
    `head.next` only with obs_loss."""
    run = make_run(world=name)
    base, episodes = wake(ir.BaseModel(run.config), 0.1), padded_episodes(name)
    obs, target, _, mask = (torch.from_numpy(part) for part in episodes)
    ir.pretrain_loss(run, base, episodes)[0].backward()
    assert {part.rsplit(".", 1)[0] for part in without_gradient(base)} == {"head.next"}
    run.config = replace(run.config, obs_loss=0.1)
    loss, stats = ir.pretrain_loss(run, base, episodes)
    loss.backward()
    assert without_gradient(base) == set()
    features = base(obs[:, :-1])
    guess, nll = base.head.next(features), -base.head(features).log_prob(target)
    if name == "small":
        obs_nll = -guess.log_softmax(-1).gather(-1, obs[:, 1:, -1:])[..., 0]
    else:
        obs_nll = 0.5 * ((guess - obs[:, 1:]) ** 2).sum(-1)
    expected = {"nll": nll[mask].sum().item() / 12, "obs_nll": obs_nll[mask].sum().item() / 12}
    assert stats == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected["nll"] + 0.1 * expected["obs_nll"], rel=1e-5)
    assert not ir.action_nll(run, base, features, episodes)[~mask].any()


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (40, 12)])
def test_muon_moves_along_the_orthogonal_factor(shape):
    """With U S V^T = the gradient's SVD, a step is U V^T times lr * 0.2 * sqrt(longer side), where the iteration
    makes about 1 of S. The second step is that of 0.95 of the decayed average and 0.05 of the gradient; the
    weight decay is lr * weight_decay of the weights."""
    weight, momentum = torch.nn.Parameter(torch.randn(shape)), torch.zeros(shape)
    size = 0.03 * 0.2 * max(shape) ** 0.5
    muon = ir.Muon([weight], lr=0.03, weight_decay=0.5)
    for _ in range(2):
        before, weight.grad = weight.detach().clone(), torch.randn(shape)
        muon.step()
        momentum = 0.95 * momentum + 0.05 * weight.grad
        U, _, Vt = torch.linalg.svd(0.95 * momentum + 0.05 * weight.grad, full_matrices=False)
        moved = U.T @ (before * (1 - 0.03 * 0.5) - weight.detach()) @ Vt.T / size
        S = moved.diagonal()
        assert torch.allclose(moved, torch.diag(S), atol=1e-4)
        assert 0.6 < S.min() and S.max() < 1.3 and abs(S.mean() - 0.95) < 0.1


def test_optimisers_of_pretraining():
    """Fast: the blocks' matrices go to Muon, the rest to AdamW at three times its rate, nothing twice. An update sets
    the rate of each to a share of its peak: it rises for a fiftieth of a phase, then it is 1, and in the second half
    it falls to 0. As in the paper: AdamW for all, at a constant rate."""
    run = make_run()
    base = ir.BaseModel(run.config)
    muon, adamw = ir.pretrain_optimisers(run.config, base)
    one, two = ([id(p) for p in optimiser.param_groups[0]["params"]] for optimiser in (muon, adamw))
    matrices = [id(p) for n, p in base.named_parameters() if re.match(r"blocks.*(?<!norm)\.weight", n)]
    assert sorted(one) == sorted(matrices) and sorted(one + two) == sorted(map(id, base.parameters()))
    shares = [ir.rate(run.config, progress) for progress in (0, 0.01, 0.02, 0.5, 0.75, 0.999, 1)]
    assert shares == pytest.approx([0.02, 0.51, 1, 1, 0.5, 0.002, 0])
    for share in (0.7, 0.2):
        ir.update(base, sum(p.sum() for p in base.parameters()), [muon, adamw], share)
        rates = [optimiser.param_groups[0]["lr"] for optimiser in (muon, adamw)]
        assert rates == pytest.approx([share * 6e-3, share * 18e-3])
    (only,) = ir.pretrain_optimisers(ir.PAPER, base)
    assert type(only) is torch.optim.AdamW and len(only.param_groups[0]["params"]) == len(one + two)
    assert {ir.rate(ir.PAPER, progress) for progress in (0, 0.3, 1)} == {1}


def make_meta(run):
    """Random weights, with a gate that is open about half of the time."""
    meta = wake(ir.Metacontroller(run.config))
    meta.switch[2].weight.data.normal_(), meta.switch[2].bias.data.zero_()
    return meta


def built(value, expected: str):
    """What a function gave that may have been emptied, to be written again (README, "Build it yourself")."""
    assert value is not None, f"the function gave nothing back, expected: {expected}"
    return value


def test_controller_is_e_plus_U_e():
    """Control is e + U e with U = out^T inn, both factors weighted sums over the controllers, one-hot for labels; it
    never makes a D x D matrix to get there. New controllers leave the base's output exactly as it is."""
    run, obs = make_run(dim=64, rank=2), torch.from_numpy(expert(4).obs[:, :9])
    base, meta, labels = ir.BaseModel(run.config), ir.Metacontroller(run.config), ir.Labels(run.config)
    residual = base.lower(obs)[0].detach()
    code, subgoal, sizes = torch.randn(4, 9, 4), torch.randint(4, (4, 9)), []
    for controlled in (meta.control(residual, code), labels.control(residual, subgoal)):
        built(controlled, "residual + U residual, (B, T, D)")
        assert torch.equal(base.upper(controlled)[0], base.upper(residual)[0])
    wake(meta), wake(labels)
    h = torch.cat([meta.decoder(code), torch.ones(4, 9, 1)], dim=-1)
    for model, given, weights in ((meta, code, h), (labels, subgoal, torch.eye(4)[subgoal])):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel() / 36) or x, lambda x: x):
            found = model.control(residual, given)
        c = getattr(model, "controller", model)
        out, inn = (torch.einsum("btk,krd->btrd", weights, factor) for factor in (c.out, c.inn))
        expected = residual + (out.transpose(-1, -2) @ inn @ residual[..., None])[..., 0]
        assert torch.allclose(found, expected, atol=1e-3) and 0 < max(sizes) < 64 * 64


@pytest.mark.parametrize("gates, threshold, opened, codes", [  # gates: what the switching unit says after step 1
    ([0, 0, 1], None, [1, 0, 0, 1], [10, 10, 10, 40]),
    ([1, 1, 1], None, [1, 1, 1, 1], [10, 20, 30, 40]),
    ([0.5, 0, 0.25], None, [1, 0.5, 0, 0.25], [10, 15, 15, 0.75 * 15 + 0.25 * 40]),
    ([0.25, 0.75, 0.5], 0.5, [1, 0.25, 0.75, 0.5], [10, 10, 30, 30]),
    ([0.5, 0.25, 0.5], 0.3, [1, 0.5, 0.25, 0.5], [10, 20, 20, 40]),
])  # fmt: skip
def test_temporal_integration_algebra(gates, threshold, opened, codes):
    """z_t = beta_t z~_t + (1 - beta_t) z_t-1: gates [1,0,0,1] on proposals [10,20,30,40] give [10,10,10,40]; gates of
    1 give the proposals; the first step always adopts; with a threshold a code is adopted above it, else kept."""
    meta, steps = make_meta(make_run(code_dim=1)), torch.arange(4.0)[None, :, None].expand(1, 4, 16)
    meta.gate = lambda residual, history, code: torch.tensor([[math.nan, *gates][int(residual[0, 0])]])
    found = meta.integrate(steps, torch.tensor([[[10.0], [20], [30], [40]]]), threshold)
    code, gate = built(found, "codes (B, T, Z) and gates (B, T)")
    assert (gate.flatten().tolist(), code.flatten().tolist()) == (opened, codes)


def test_encoder_by_hand():
    """Residuals are read with a root mean square of 1. A proposal comes from a step itself, a GRU over the steps
    before it, and a summary: a GRU from the last step to the first. Proposals see the future, `integrate` does not."""
    meta, view, count = make_meta(make_run()), torch.randn(4, 11, 16), torch.tensor([10, 7, 3, 1])
    found = torch.cat(meta.encode(3 * view, count), dim=-1)
    view = view / view.square().mean(-1, keepdim=True).sqrt()
    for i, last in enumerate(count):
        summary = meta.embedder(view[i, : last + 1].flip(0))[1][0]
        for t in range(last):
            history = meta.history(view[i, :t])[1][0] if t else torch.zeros(meta.history.hidden_size)
            assert torch.allclose(found[i, t], meta.encoder(torch.cat([view[i, t], history, summary])), atol=1e-5)
    later, proposal = torch.cat([view[:, :5], torch.randn(4, 6, 16)], dim=1), torch.randn(4, 11, 4)
    for before, after in zip(meta.integrate(view, proposal), meta.integrate(later, proposal)):
        assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("progress", [0.0, 1.0])
@pytest.mark.parametrize("changes", [
    {}, {"blind": 0.0, "shuffle": False, "swiglu": False, "relative_obs": False}, {"world": "ant"},
], ids=["grid", "paper", "ant"])  # fmt: skip
def test_discovery_trains_all_of_the_metacontroller_and_nothing_else(changes, progress):
    """The action loss alone (no KL) gives every metacontroller parameter a gradient; the frozen base gets none."""
    run = make_run(**changes, kl_weight=0.0)
    base, meta = ir.BaseModel(run.config).requires_grad_(False), ir.Metacontroller(run.config)
    episodes = run.world.episodes(12, np.random.default_rng(0))
    wake(meta.controller)  # what it writes starts at zero, and without control no gradient gets past it
    ir.discovery_loss(run, base, meta, episodes, np.random.default_rng(0), progress)[0].backward()
    assert without_gradient(meta) == set() and all(p.grad is None for p in base.parameters())


def test_schedule_of_discovery():
    """For the first share `blind` of phase 2 all episodes are read blind, half as long later none is any more, between
    them half of the episodes. With `blind` 1 all are; with 0, as in the paper, none ever is. A nat costs kl_weight,
    but nothing for the first share `free_codes`, and ever more until twice this share."""
    run = make_run(blind=0.4, free_codes=0.2, kl_weight=3.0)
    assert [ir.price(run.config, p) for p in (0, 0.2, 0.3, 0.4, 1)] == pytest.approx([0, 0, 1.5, 3, 3])
    share = lambda progress: (ir.draw_blind(run, torch.zeros(4000, 3, 6), progress)[:, 1:] < 0).float().mean(0)
    assert (share(0) == 1).all() and (share(0.4) == 1).all() and (share(0.61) == 0).all() and (share(1) == 0).all()
    assert 0.45 < share(0.5)[0] < 0.55 and share(0.5).shape == (2,)
    run.config = replace(run.config, blind=1.0)
    assert (share(0) == 1).all() and (share(1) == 1).all()
    run.config = ir.PAPER
    assert (share(0) == 0).all() and ir.price(run.config, 0) == run.config.kl_weight


def test_code_kl_is_that_of_gaussians():
    """The KL of N(mean, std) to N(0, I) is that of PyTorch, summed over a code's numbers; N(0, I) costs nothing."""
    mean, log_std = torch.randn(2, 5, 7, 8)
    found = built(ir.code_kl(mean, log_std), "nats, one number for each code")
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(found, expected, atol=1e-4), f"expected {expected[0, :3]}, found {found[0, :3]}"
    assert not ir.code_kl(torch.zeros(3, 8), torch.zeros(3, 8)).any(), "N(0, I) itself must cost nothing"


@BOTH
@pytest.mark.parametrize("progress, forget", [
    (0.19, False), (0.21, False), (0.5, False), (0.5, True), (1.0, False), (1.0, True),
])  # fmt: skip
def test_discovery_loss_by_hand(name, progress, forget):
    """The loss is the action loss of the steered base plus the price times the KL to N(0, I) of the proposals, read
    off a shuffled view, whatever stands in the padding. The encoder reads the entries and the last observation, all of
    it blind; between entries the proposal is N(0, I), unless codes are free. The gate reads the real episode. A blind
    episode is read blind below the controller and above. With `forget`, the upper blocks forget all up to an opening
    of the gate."""
    run = make_run(world=name, kl_weight=0.7, blind=0.4, free_codes=0.2, forget=forget)
    base, meta, episodes = wake(ir.BaseModel(run.config), 0.1), make_meta(run), padded_episodes(name)
    upper, integrate, read, given, found = base.upper, meta.integrate, [], [], []
    lower = base.lower
    base.upper = lambda x, faded=None, past=None: read.append(faded) or upper(x, faded, past)
    base.lower = lambda x, faded=None, past=None: read.append(faded) or lower(x, faded, past)
    meta.integrate = lambda *a, **k: given.append(a) or found.append(integrate(*a, **k)) or found[-1]
    result = ir.discovery_loss(run, base, meta, episodes, np.random.default_rng(0), progress)
    loss, stats = built(result, "the loss, and a dictionary of nll, kl and gates, all means over episodes")
    (code, gate), mask, (faded, _, above) = found[0], torch.from_numpy(episodes.mask), read
    blind = int((faded[:, 1] < 0).sum())
    assert blind in {0.19: [12], 0.21: [12], 0.5: range(1, 12), 1.0: [0]}[progress]
    assert 0.01 < gate[:, 1:].mean() < 0.99
    residual, proposal = given[0]
    assert torch.equal(residual, base.lower(torch.from_numpy(episodes.obs[:, :-1]), faded)[0])
    entry = mask & torch.from_numpy(run.world.is_entry(episodes.obs)[:, :-1] | (progress < 0.2))
    shuffled = torch.from_numpy(run.world.shuffled(episodes.obs, np.random.default_rng(0)))
    view = base.lower(shuffled, ir.each_alone(shuffled))[0]
    means, stds = torch.zeros(*mask.shape, 4), torch.ones(*mask.shape, 4)
    for i in range(12):
        steps = [*entry[i].nonzero()[:, 0].tolist(), int(mask[i].sum())]
        mean, log_std = meta.encode(view[i : i + 1, steps], torch.tensor([len(steps) - 1]))
        means[i, steps[:-1]], stds[i, steps[:-1]] = mean[0, :-1], log_std[0, :-1].exp()
    kl = kl_divergence(Normal(means, stds), Normal(0.0, 1.0)).sum().item() / 12
    noise = (proposal - means) / stds
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.15
    assert torch.allclose(above, faded + ir.forget_at(gate) if forget else faded)
    features = upper(meta.control(residual, code), above)[0]
    nll = -base.head(features).log_prob(torch.from_numpy(episodes.target))
    expected = {"nll": (nll * mask).sum().item() / 12, "kl": kl, "gates": (gate * mask).sum().item() / 12}
    assert stats == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected["nll"] + min(1, max(0, 5 * progress - 1)) * 0.7 * kl, rel=1e-5)


def test_switches_of_the_control_experiments():
    """With `force_open` the gate is 1 at every step, soft or hard, and in a rollout every step is a decision. With
    `cotrain` the base that is given begins anew and learns in phase 2, and is frozen afterwards; else it stays."""
    run, base, _, policy = make_players("small", force_open=True)
    meta, codes, batch = make_meta(run), ir.PolicyCodes(run, 20, policy), run.world.batch(20, np.random.default_rng(0))
    code, gate = meta.integrate(torch.randn(3, 7, 16), proposal := torch.randn(3, 7, 4), 0.5)
    assert torch.equal(code, proposal) and (gate == 1).all()
    played, _ = ir.rollout(run, base, ir.CodePilot(run, 20, meta, codes), batch)
    assert sum(len(rows) for rows, *_ in codes.made) == played.mask.sum()
    for cotrain in (False, True):
        run = make_run(**SHORT, cotrain=cotrain)
        base = wake(ir.BaseModel(run.config)).requires_grad_(False)
        before, meta = copy_of(base), ir.discover(run, base)
        assert changed(base, before) == ({*before} if cotrain else set())
        assert not any(p.requires_grad for model in (base, meta) for p in model.parameters())
    run.seeded("discover"), ir.Metacontroller(run.config)
    fresh = copy_of(ir.BaseModel(run.config))
    assert all((base.state_dict()[name] - fresh[name]).abs().max() < 0.2 for name in fresh)


def test_every_phase_trains_its_own_model_and_freezes_it(monkeypatch):
    """Each phase returns a model that has learned and is frozen, and leaves the models that it was given as they were:
    raw-action RL trains a copy of the base. Discovery is told how much of it is done, each kind of RL its own rate."""
    steps = {"discover_steps": 5, "kl_weight": 0.2, "rl_batch": 64, "rl_lr": 2e-3, "raw_lr": 1e-3}
    run, models = make_run(**(SHORT | steps), rl_episodes=128), {}
    monkeypatch.setattr(ir, "discovery_loss", loss := Mock(wraps=ir.discovery_loss))
    monkeypatch.setattr(ir, "reinforce", reinforce := Mock(wraps=ir.reinforce))
    run.world = replace(run.world, rl_task=(0,), limit=20)  # easy enough for chance
    for name, stage in ir.STAGES.items():
        before = {other: copy_of(model) for other, model in models.items()}
        models[name] = stage.train(run, *(models[need] for need in stage.needs))
        assert not any(p.requires_grad for model in models.values() for p in model.parameters())
        assert not any(changed(models[other], kept) for other, kept in before.items())
        run.seeded(name)
        start = models["pretrain"] if name == "raw" else stage.build(run.config)  # the same seed: the same weights
        assert changed(models[name], copy_of(start))
        assert name not in ("rl", "raw") or 0 < run.curves[name][0][1] < 1
    assert np.allclose([call.args[-1] for call in loss.call_args_list], [0, 0.2, 0.4, 0.6, 0.8])
    assert [(call.args[1], call.args[3]) for call in reinforce.call_args_list] == [("rl", 2e-3), ("raw", 1e-3)]


GRID_OF_THE_PAPER = {  # its App. A, C and D, tables A1 to A14; lambda and alpha are among those that it tried
    "world": "paper", "layers": 6, "dim": 256, "mlp": 512, "swiglu": False, "relative_obs": False, "init_scale": 0.1,
    "control_block": 3, "blind_blocks": 0, "forget": False, "temperature": 1, "rank": 16, "blind": 0, "jumps": 0,
    "pretrain_steps": 256_000, "pretrain_batch": 1024, "pretrain_lr": 3e-4, "fast_optimiser": False, "obs_loss": 0.01,
    "discover_steps": 64_000, "discover_batch": 512, "discover_lr": 1e-3, "steer_steps": 3200, "kl_weight": 0.17,
    "history_dim": 32, "encoder_hidden": 64, "code_dim": 8, "shuffle": False, "force_open": False, "cotrain": False,
    "rl_episodes": 100_000 * 1024, "rl_batch": 1024, "rl_lr": 3e-5, "rl_epochs": 1, "rl_minibatches": 1,
    "rl_clip": 0.2, "raw_lr": 3e-5, "policy_dim": 256, "least_std": 0, "free_codes": 0,
}  # fmt: skip
ANT_OF_THE_PAPER = GRID_OF_THE_PAPER | {
    "world": "ant-simulated", "layers": 8, "control_block": 4, "rank": 256, "obs_loss": 10,
    "pretrain_steps": 204_800, "pretrain_batch": 512, "discover_steps": 32_000, "discover_batch": 128,
    "discover_lr": 3e-4, "rl_episodes": 51_200 * 256, "rl_batch": 256,
}  # fmt: skip


@pytest.mark.parametrize("env, sizes", [("grid", GRID_OF_THE_PAPER), ("ant", ANT_OF_THE_PAPER)])
def test_paper_preset_is_the_papers_and_runs(env, sizes, monkeypatch):
    """`--preset paper` has the paper's number in every field but `eval_episodes`, our own. Two steps of each of its
    phases run, with few and short episodes. Its models have the parameter counts worked out here by hand."""
    c = ir.PRESETS[env]["paper"]
    assert {name: value for name, value in asdict(c).items() if name != "eval_episodes"} == sizes
    few = {"pretrain_steps": 2, "steer_steps": 2, "discover_steps": 2, "rl_batch": 4, "rl_episodes": 8}
    run, models = ir.Run(replace(c, **few), 0, CPU), {}
    run.world = replace(run.world, limit=40, rl_task=(0,))
    clean = lambda run, rng, batch: iter(lambda: run.world.simulate(run.world.pretrain_tasks, 2, rng)[0], None)
    monkeypatch.setattr(ir, "expert_batches", clean)
    for name, stage in ir.STAGES.items():
        models[name] = stage.train(run, *(models[need] for need in stage.needs))
        assert all(p.isfinite().all() for p in models[name].parameters())
    if env == "grid":
        size = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        block = 2 * 256 + 4 * 256 * 256 + 4 * 32 + 2 * 256 * 512  # norms, attention, relative bias, MLP
        assert size["pretrain"] == 637 * 256 + 6 * block + 256 + 257 * 4 + 257 * 49 == 3_326_517
        gru, encoder, switch, decoder = 3 * 32 * (256 + 32 + 2), 321 * 64 + 65 * 16, 297 * 64 + 65, 9 * 32 + 33 * 8192
        assert size["discover"] == 2 * gru + encoder + switch + decoder == 366_961


# ---- Rollouts, measurements and reinforcement learning ---------------------------------------------
def make_players(name, **changes):
    """run, frozen base and metacontroller, policy, all with random weights; rollouts are short."""
    run = make_run(world=name, **changes)
    assert run.held_out  # made here, before the limit becomes too short for experts
    run.world = replace(run.world, limit=40 if name == "ant" else 100)
    base, meta = wake(ir.BaseModel(run.config), 0.2), make_meta(run)
    return run, base.requires_grad_(False), meta.requires_grad_(False), wake(ir.Policy(run.config), 0.1)


class NotingPilot(ir.CodePilot):
    """Writes down at each step whose gates opened, and the codes of all episodes, also those before the first step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.openings, self.codes = [], [self.code.clone()]

    def steer(self, residual, batch, rows):
        controlled = super().steer(residual, batch, rows)
        self.openings.append((rows, self.opened))
        self.codes.append(self.code.clone())
        return controlled


@BOTH
@pytest.mark.parametrize("blind, forget, temperature, threshold", [
    (0.7, False, 1, 0.5), (1.0, False, 0.3, 0.2), (0.0, True, 2, 0.8), (1.0, True, 0.5, 0.5),
])  # fmt: skip
def test_rollout_equals_the_whole_sequence(name, blind, forget, temperature, threshold):
    """Rollouts, which go step by step and drop the dead, have the gates and log-probabilities that discovery's form of
    the model gives the same episodes at once, at the temperature asked for: dropping changes nothing for the living.
    The base has its memory, unless `blind` is 1; with `forget`, above the controller that since the last opening of
    the gate. The actions are drawn from just these distributions: their mean log-probability is minus the entropy."""
    changes = {"blind": blind, "forget": forget, "temperature": temperature, "blind_blocks": int(forget)}
    run, base, meta, _ = make_players(name, **changes)
    meta.threshold = threshold
    pilot = NotingPilot(run, 120, meta, lambda residual, rows: residual[:, :4])
    played, _ = ir.rollout(run, base, pilot, run.world.batch(120, np.random.default_rng(0)))
    faded = ir.each_alone(played.inputs) if blind == 1 else None
    residual, mask = base.lower(played.inputs, faded)[0], played.mask.bool()
    code, gate = meta.integrate(residual, residual[..., :4], threshold)
    faded = ir.forget_at((gate > threshold).float()) if forget and blind < 1 else faded
    wanted = base.head(base.upper(meta.control(residual, code), faded)[0], temperature)
    expected = wanted.log_prob(played.chosen)
    surprise = (expected + wanted.entropy())[mask]
    assert surprise.mean().abs() < 5 * surprise.std() / len(surprise) ** 0.5
    gate_open = ir.by_episode(pilot.openings)[0]  # at each step
    assert torch.equal((gate > threshold) & mask, gate_open)
    assert torch.allclose(expected * mask, played.log_prob, atol=2e-3)
    assert len(mask.sum(1).unique()) > 5 and 0 < gate_open[:, 1:].sum() < mask[:, 1:].sum()


@BOTH
def test_code_is_held_between_switches_where_alone_it_is_chosen(name):
    """The code of a living episode changes exactly where its gate is open, as it is at the first step. What internal
    RL learns from is one decision a switch, in order. Computed again on whole sequences, of decisions or of raw
    actions, log-probabilities are those of the rollout: the first ratio is 1."""
    run, base, meta, policy = make_players(name)
    first, codes = (ir.PolicyCodes(run, 50, policy) for _ in range(2))
    built(first(torch.randn(2, 16), torch.tensor([3, 7])), "the codes (B, Z) of the rows")
    pilot = NotingPilot(run, 50, meta, codes)
    played, _ = ir.rollout(run, base, pilot, run.world.batch(50, np.random.default_rng(0)))
    opened, code = ir.by_episode(pilot.openings)[0], torch.stack(pilot.codes, dim=1)
    assert torch.equal(code.diff(dim=1).any(dim=-1), opened) and opened[:, 0].all()
    batch = ir.Decisions(*ir.by_episode(codes.made), played.reward)
    assert 50 < batch.mask.sum() < played.mask.sum() and batch.log_prob.std() > 0.1
    assert torch.equal(batch.mask.sum(1), opened.sum(1))
    assert torch.equal(batch.chosen[batch.mask.bool()], code[:, 1:][opened])
    log_prob = policy(batch.inputs)[0].log_prob(batch.chosen)
    assert torch.allclose(log_prob * batch.mask, batch.log_prob, atol=1e-3)
    batch, _ = ir.play_actions(run, base, 16, np.random.default_rng(0))
    log_prob = base.head(base(batch.inputs)).log_prob(batch.chosen)
    assert torch.allclose(log_prob * batch.mask, batch.log_prob, atol=1e-3) and batch.log_prob.min() < -0.5


def test_distribution_of_codes():
    """The codes of a new policy are standard normal; those of a policy that has learned have its mean and its
    deviation, and are its means when they are not sampled."""
    run, _, _, policy = make_players("small")
    new, residual, rows = ir.Policy(run.config), torch.randn(20_000, 16), torch.arange(20_000)
    for p in (new, policy):
        with torch.no_grad():
            code, gaussian = ir.PolicyCodes(run, 20_000, p)(residual, rows), p(residual[:, None])[0].base_dist
        noise = (code - gaussian.mean[:, 0]) / gaussian.stddev[:, 0]
        assert noise.mean(0).abs().max() < 0.03 and (noise.std(0) - 1).abs().max() < 0.03
        assert p is policy or not (gaussian.mean.any() or (gaussian.stddev - 1).any())
    code = ir.PolicyCodes(run, 20_000, policy, sample=False)(residual, rows)
    assert torch.allclose(code, gaussian.mean[:, 0], atol=1e-5) and code.std() > 0.1


@pytest.mark.parametrize("blind", [0.65, 1.0])
def test_labels_learn_on_the_memory_of_phase_3(blind):
    """While ground-truth controllers learn, the base remembers all steps so far, or none if it is blind in RL, too."""
    run, base, _, _ = make_players("small", blind=blind, **SHORT)
    base.lower = Mock(wraps=base.lower)
    ir.train_labels(run, base)
    seen = [call.args for call in base.lower.call_args_list]
    assert len(seen) == SHORT["steer_steps"]
    assert all(torch.equal(faded, ir.each_alone(obs) * (blind == 1)) for obs, faded in seen)


def test_label_pilot_switches_with_the_subgoal():
    """Ground-truth controllers: that of the true subgoal, which changes after each visit. There its gate opens."""
    run, base, _, _ = make_players("small")
    labels, seen = wake(ir.Labels(run.config)), []
    control, pilot = labels.control, ir.LabelPilot(run, 40, labels)
    labels.control = lambda residual, subgoal: seen.append((subgoal, pilot.opened)) or control(residual, subgoal)
    played, visited = ir.rollout(run, base, pilot, run.world.batch(40, np.random.default_rng(0)))
    for t, (subgoal, opened) in enumerate(seen):
        alive = played.mask[:, t] > 0
        stage = (visited[alive, :t] >= 0).sum(axis=1)
        assert subgoal[:, 0].tolist() == [run.world.rl_task[n] for n in stage]
        assert opened.tolist() == (visited[alive, t - 1] >= 0 if t else alive[alive]).tolist()
    assert (visited >= 0).any()


def test_transitions_and_nearness_by_hand():
    """Single colours: after 0 came 1 twice; after 1 came 3, 2. Pairs: after 0-1 came 2-3 once, and once no pair.
    Of three marks, one has another mark at most one step away in the same episode, two at most two steps."""
    single = ir.transition_counts(SMALL, np.array([[0, -1, 1, 3], [-1, 0, 1, 2]]))
    assert single.tolist() == [[0, 2, 0, 0, 0], [0, 0, 1, 1, 0], [0] * 5, [0] * 5]
    pairs = ir.transition_counts(PAPER, np.array([[0, -1, 1, 2, 3, 4], [0, 1, -1, -1, 5, 4]]))
    assert pairs.tolist() == [[0, 1, 0, 0, 1], [0] * 5, [0] * 5, [0] * 5]
    marks = np.array([[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=bool)
    others = np.array([[0, 1, 0, 0, 0], [1, 0, 0, 0, 1]], dtype=bool)
    assert [ir.share_near(marks, others, n) for n in (0, 1, 2, 3)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@BOTH
@pytest.mark.parametrize("late", [0, 1, 5, 6])
def test_a_switch_close_to_a_change_is_a_hit(name, late, monkeypatch):
    """Gates that open exactly `late` steps after each true change of subgoal are right if that is within the world's
    tolerance, 1 step on the grid and 5 for the ant, else often wrong; the first step is no switch."""
    run, base, meta, _ = make_players(name)
    _, _, goal, mask = run.held_out
    change = (np.diff(goal, axis=1, prepend=goal[:, :1]) != 0) & mask
    gate = np.roll(change, late, axis=1) | (np.arange(change.shape[1]) == 0)
    fake = torch.randn(*gate.shape, 4), torch.from_numpy(gate).float(), *torch.ones(2, *gate.shape)
    monkeypatch.setattr(ir, "encode", lambda *arguments: fake)
    found = ir.measure_codes(run, meta, {"pretrain": base})
    scores, near = (found["switch_precision"], found["switch_recall"]), late <= (1 if name == "small" else 5)
    assert (scores[0] == 1 and scores[1] > 0.9) if near else max(scores) < 0.9
    assert found["true_changes_per_episode"] == change.sum() / 16 and found["random_switch_precision"] < 0.9


def test_parts_of_the_claims_by_hand():
    """Of 10 trials 5 succeeded: Wilson's interval is .237 to .763; of 1,000 none: up to .0038. A base steered after
    another block has the same weights. Of the task 0-1-2-3-0-1 an episode that visits 0-1-3 has made two visits.
    A first code is held until the gate opens or until the step asked for, then comes the second. In two episodes that
    visit 0-1 and 0-2, one of two unseen transitions that could be made is made; what comes later does not count."""
    assert ir.share_of(5, 10) == pytest.approx([0.5, 0.2366, 0.7634], abs=1e-4)
    assert ir.share_of(0, 1000) == pytest.approx([0, 0, 0.00383], abs=1e-5)
    run, base, meta, _ = make_players("small", layers=3)
    obs = run.tensor(run.held_out.obs)
    x = base.embed(obs)
    other = copy.copy(base)
    for block in range(4):
        other.control_block = block
        assert torch.equal(other.lower(obs)[0], x)
        x = base.blocks[block](x)[0] if block < 3 else x
    assert base.control_block == 1 and other.embed is base.embed
    visited = np.array([[0, -1, 1, 3], [-1, -1, -1, -1], [1, -1, -1, -1], [0, 1, 2, -1]])
    assert ir.right_visits(SMALL, visited).tolist() == [2, 2, 1, 0, 0, 0]
    assert ir.unseen_share(SMALL, np.array([[0, -1, 1, 2], [-1, 0, 2, 3]]))[0] == 0.5
    for gate, when, expected in ((0, 2, [1, 1, 2, 2]), (0, -1, [1, 1, 1, 1]), (1, 3, [1, 2, 2, 2])):
        meta.gate = lambda residual, history, code, gate=gate: torch.full((len(code),), float(gate))
        pilot, held = ir.two_codes(run, meta, torch.ones(5, 4), torch.full((5, 4), 2.0), when), []
        for step in range(4):
            pilot.steer(torch.randn(5, 16), None, torch.arange(5))
            held.append(pilot.code[0, 0].item())
            assert pilot.opened.all() == (step == 0 or gate == 1 or step == when)
        assert held == expected


def test_verdicts_on_control_experiments():
    """The claim about controls holds if all seeds of the run itself succeed, and all of each kind at its price fail.
    That about freezing holds if at some price most runs on frozen bases open where the subgoal changes, at none those
    on bases that learned jointly; not if one kind is missing. Runs with other schedules are listed apart."""
    run = make_run(kl_weight=0.1)

    def control(kind="frozen", success=0.0, price=0.1, recall=1.0, blind=0.65, free=0.0):
        config = asdict(replace(run.config, kl_weight=price, blind=blind, free_codes=free))
        config |= {"force_open": kind == "forced", "cotrain": kind == "joint"}
        gate = {"switch_precision": 1.0, "switch_recall": recall, "switches_per_episode": 2.0}
        return config, {"internal_rl_success": success, "kl_nats": 3.0, "steered_nats": 1.0, **gate}

    for own, others, expected in (
        (0.9, [control("forced"), control("joint")], True),
        (0.1, [control("forced"), control("joint")], False),
        (0.9, [control("forced"), control("joint"), control("joint", 0.5)], False),
        (0.9, [control("forced"), control("joint"), control("joint", 0.5, price=0.3)], True),
        (0.9, [control("forced"), control("joint"), control("joint", 0.5, blind=0)], True),
        (0.9, [control("forced"), control("joint"), control("joint", 0.5, free=0.3)], True),
        (0.9, [control("joint")], False),
    ):
        runs = [control(success=own), control(success=0.9), *others]
        assert ir.claim_controls(run.config, runs)[1] is expected
    for others, expected in (
        ([control("frozen"), control("frozen", recall=0.2, price=0.3), control("joint", recall=0.2)], True),
        ([control("frozen"), control("joint", recall=0.2), control("joint", blind=0)], True),
        ([control("frozen"), control("joint"), control("forced")], False),
        ([control("frozen"), *[control("frozen", recall=0.2)] * 2, control("joint", recall=0.2)], False),
        ([control("frozen")], False),
    ):
        assert bool(ir.claim_rate(run.config, others)[1]) is expected


def test_gradient_signal():
    """The gradient of a bandit, taken in batches of four times the size, has four times the signal: its mean is the
    same, its variance a quarter. If each batch gives the same gradient, there is no noise: the signal has no bound."""
    found = {}
    for size in (64, 256):
        run = make_run(rl_batch=size)
        policy = ir.Policy(run.config)
        play, log_prob = bandit(run, policy)
        found[size] = ir.gradient_signal(policy, lambda: play(None), log_prob, 0.5, batches=400)
    assert 2.5 < found[256]["signal"] / found[64]["signal"] < 6
    assert found[64]["decisions"] == pytest.approx(2) and found[64]["success"] == pytest.approx(0.16, abs=0.02)
    same = play(None)
    assert not 0 < ir.gradient_signal(policy, lambda: same, log_prob, 0.5, batches=4)["signal"] < 1e3


def test_objective_by_hand():
    """A = (R - mean) / std: one success in four has mean 1/4, standard deviation sqrt(3)/4; no success, all zero.
    The loss is -mean over decisions made of min(ratio A, clip(ratio) A), with the advantage of each sample."""
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (math.sqrt(3) / 4 + 1e-3)
    assert torch.allclose(ir.terminal_advantage(torch.tensor([1.0, 0, 0, 0])), expected)
    assert not ir.terminal_advantage(torch.zeros(4)).any()
    log_prob, old, advantage = *torch.randn(2, 40, 4), torch.randn(40)
    mask, gains = (torch.arange(4) < torch.tensor([4, 2, 1, 3, 4] * 8)[:, None]).float(), []
    for n, k in mask.nonzero():
        ratio = math.exp(log_prob[n, k] - old[n, k])
        gains.append(min(ratio * advantage[n].item(), min(max(ratio, 0.7), 1.3) * advantage[n].item()))
    found = built(ir.policy_loss(log_prob, old, advantage, mask, 0.3), "a scalar to minimise")
    assert found.item() == pytest.approx(-np.mean(gains), rel=1e-4)


def test_thinned_batch_has_the_same_gradient(monkeypatch):
    """Raw RL learns from every success and a few failures; averaged over many draws, the advantages of the episodes
    are those of the whole batch, up to one factor. It reports the success of all episodes."""
    reward, number, total = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 0, 0]), torch.arange(10), torch.zeros(10)
    played = ir.Decisions(number, number, number, torch.ones(10, 3), reward)
    monkeypatch.setattr(ir, "rollout", lambda *a, **k: (played, None))
    run = make_run()
    run.world = Mock()
    for seed in range(2000):
        torch.manual_seed(seed)
        batch, success = ir.play_actions(run, None, 10, None, failures=4)
        assert len(batch.reward) == 6 and batch.reward.sum() == 2 and success == pytest.approx(0.2)
        total[batch.inputs] += ir.terminal_advantage(batch.reward)
    assert torch.allclose(total / total[0], torch.where(reward > 0, 1.0, -0.25), atol=0.04)  # (1 - 0.2) to (0 - 0.2)


def bandit(run, policy, pays=1.0):
    """`play` and `log_prob` for `reinforce`: two codes an episode, a reward if the first begins above `pays`."""
    count = run.config.rl_batch
    inputs = torch.ones(count, 2, 16)

    def play(rng):
        codes = policy(inputs)[0]
        code = codes.sample()
        log_prob, reward = codes.log_prob(code).detach(), (code[:, 0, 0] > pays).float()
        return ir.Decisions(inputs, code, log_prob, torch.ones(count, 2), reward), reward.mean().item()

    return play, lambda inputs, code: policy(inputs)[0].log_prob(code)


def test_rewarded_code_becomes_likelier(monkeypatch):
    """On a bandit that pays one code in six, `reinforce` raises success from 16% to over 80%, at the rates of a whole
    phase; the policy leaves N(0, I) by over a nat, deviations above `least_std`. Without success it learns nothing."""
    run, rate, asked = make_run(rl_batch=256, rl_episodes=256 * 25, least_std=0.1), ir.rate, []
    monkeypatch.setattr(ir, "rate", lambda c, progress: asked.append(progress) or rate(c, progress))
    policy = ir.Policy(run.config)
    ir.reinforce(run, "rl", policy, 1e-2, *bandit(run, policy))
    curve, kl = run.curves["rl"], kl_divergence(policy(torch.ones(1, 1, 16))[0].base_dist, Normal(0.0, 1.0)).sum()
    assert asked == pytest.approx(np.arange(25) / 25)
    assert [episodes for episodes, _ in curve] == list(range(256, 256 * 26, 256))
    assert 0.08 < curve[0][1] < 0.25 and curve[-1][1] > 0.8 and kl > 1
    policy.head.bias.data[4:] = -9
    assert policy(torch.ones(1, 1, 16))[0].stddev.min().item() == pytest.approx(0.1)
    before = copy_of(policy)
    ir.reinforce(run, "raw", policy, 1e-2, *bandit(run, policy, math.inf))
    assert changed(policy, before) == set() and run.curves["raw"][-1] == (6400, 0)


# ---- Runs: phases, checkpoints, messages -----------------------------------------------------------
def run_main(out, *flags) -> int:
    """A quick run of the command, in which episodes of the post-training task end after 20 steps."""
    batch, scattered = envs.World.batch, envs.World.scattered
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs.World, "batch", lambda world, *a, **k: batch(replace(world, limit=20), *a, **k))
        patch.setattr(envs.World, "scattered", lambda world, *a: scattered(replace(world, limit=20), *a))
        quick = "--fast --device cpu --eval_episodes 16 --pretrain_steps 10 --out".split()
        return ir.main([*quick, str(out), *flags])


def results(folder) -> dict:
    """The metrics of a run, but for the minutes it took."""
    return {k: v for k, v in json.loads((folder / "results.json").read_text()).items() if "minutes" not in k}


def one_line(capsys) -> str:
    error = capsys.readouterr().err  # must be one line of ours
    assert error.count("\n") == 1 and error.startswith("internal_rl: "), error
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert run_main(folder, "--seed", "0,1", "--no-figures") == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished / "seed-0", tmp_path / "copy")


def test_runs_leave_what_they_promise(finished, monkeypatch):
    """Each folder has config, metrics and models that the safe default of torch.load reads; several seeds, whose
    metrics differ, are collected in one file and drawn in one picture."""
    first, second = (finished / f"seed-{seed}" for seed in (0, 1))
    assert set(contents(first)) == {"config.json", "metrics.csv", "results.json", "run.pt"}
    assert set(json.loads((first / "config.json").read_text())) == {"seed", *ir.Config.__dataclass_fields__}
    saved = torch.load(second / "run.pt", weights_only=True)
    assert [*saved] == [*ir.STAGES] and all(content["seed"] == 1 for content in saved.values())
    assert {line.split(",")[0] for line in (first / "metrics.csv").read_text().splitlines()} == {*ir.STAGES}
    collected = json.loads((finished / "grid-classroom.json").read_text())
    for entry, metrics in zip(collected["seeds"], (results(first), results(second)), strict=True):
        assert all(entry[key] == value for key, value in metrics.items() if not isinstance(value, list))
    assert results(first)["base_excess_nats"] != results(second)["base_excess_nats"]
    found = results(first)
    assert all(found[f"{key}_normalised"] == found[key] / found["expert_success"] for key in ir.NORMALISED)
    drawn = []
    monkeypatch.setattr(ir, "draw_curves", lambda axis, seeds: drawn.extend(metrics["seed"] for metrics in seeds))
    assert run_main(finished, "--seed", "0,1") == 0 and drawn == [0, 1] and (finished / "picture.png").exists()


def test_success_is_divided_by_the_experts(copied):
    """`..._normalised` is a success divided by the expert's. Beside each success stands its interval."""
    saved = torch.load(copied / "run.pt")
    for content in saved.values():
        content["metrics"] |= {key: 0.25 for key in content["metrics"] if key in ir.NORMALISED}
    saved["pretrain"]["metrics"]["expert_success"] = 0.5
    torch.save(saved, copied / "run.pt")
    assert run_main(copied, "--no-figures") == 0
    assert [results(copied)[f"{key}_normalised"] for key in ir.NORMALISED] == [0.5] * 4
    episodes, found = ir.FAST["eval_episodes"], results(copied)["intervals_95"]
    assert {*found} == {"base_reach", "expert_success", "random_code_success", *ir.NORMALISED}
    assert found["steer_success"] == pytest.approx(ir.share_of(0.25 * episodes, episodes)[1:])
    assert found["internal_rl_success"] == pytest.approx(ir.share_of(episodes, 4 * episodes)[1:])


def test_interrupted_run_resumes(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C at the end of discovery is one line and status 130. The same command then ends as if nothing had
    happened: with the very metrics and weights of another run of that seed, a raster, `key: value` lines, a picture.
    Nothing done is done again, nothing begun is twice in metrics.csv, a model read from its checkpoint is frozen."""
    with monkeypatch.context() as patch:
        patch.setattr(ir, "fit_readout", Mock(side_effect=KeyboardInterrupt))
        assert run_main(tmp_path) == 130
    before = torch.load(tmp_path / "run.pt")
    assert "resume" in one_line(capsys) and [*before] == ["pretrain", "steer"]
    assert run_main(tmp_path) == 0 and results(tmp_path) == results(finished / "seed-0")
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert len(rows) == len({(phase, step, metric) for phase, step, _, metric, _ in rows})
    after, whole = (torch.load(folder / "run.pt") for folder in (tmp_path, finished / "seed-0"))
    assert after["pretrain"]["metrics"] == before["pretrain"]["metrics"] and (tmp_path / "picture.png").exists()
    printed = capsys.readouterr().out
    assert all(f"\n{start}" in printed for start in ("true subgoal", "gate opens", "internal_rl_success: "))
    # The second call had three stages left to do. Each line has the time left for its phase and for the whole run.
    lines = re.findall(r"^(\d/\d \w+) .*/s; left: phase (\d+) s, whole run (\d+\.\d) min$", printed, re.M)
    assert [place for place, *_ in lines][-3:] == ["1/3 discover", "2/3 rl", "3/3 raw"]
    assert all(float(whole) * 60 + 3.1 >= int(phase) for _, phase, whole in lines) and float(lines[-1][-1]) == 0
    run = ir.Run(ir.Config(**after["raw"]["config"]), 0, CPU, tmp_path)
    ir.load_saved(run, "all")
    for stage in ir.STAGES:
        model = ir.load_model(run, stage)
        assert changed(model, whole[stage]["model"]) == set()
        assert not any(p.requires_grad for p in model.parameters())


def test_ant_runs(tmp_path):
    """With --env ant all phases run, with finite metrics, and the picture is drawn."""
    few = "--env ant --rl_batch 8 --rl_episodes 8 --threads 1 --pretrain_steps 2 --steer_steps 2 --discover_steps 2"
    assert run_main(tmp_path, *few.split()) == 0 and (tmp_path / "picture.png").exists()
    assert all(math.isfinite(x) for x in ir.single_numbers(results(tmp_path)).values())


def test_claims_of_a_finished_run(copied, tmp_path, capsys, monkeypatch):
    """`--phase claims` measures each claim, writes numbers and verdicts, draws them, and measures none twice. Control
    experiments are read from a folder; without any, the claims that need them are left out. The base that was trained
    jointly is the one that is saved. A control without its config, and a run without a later phase, are one line."""
    curves, share = {"solved": [0, 0, 0.1], "by visit": [0.5, 0.1]}, [0.5, 0.4, 0.6]
    long = {"depth": [0.5, 0.4], "explore": curves, "credit": share, "raw": share}  # these take long
    quick = {name: Mock(return_value=({"a share": numbers}, True)) for name, numbers in long.items()}
    monkeypatch.setattr(ir, "CLAIMS", ir.CLAIMS | quick)
    before, claims, controls = contents(copied), ["--phase", "claims", "--runs"], tmp_path / "controls"
    assert run_main(copied, *claims, "none") == 0
    found = json.loads((copied / "claims.json").read_text())["seeds"][0]["claims"]
    assert [*found] == ["belief", "depth", "gate", "goal", "explore", "credit", "raw"]
    shown = capsys.readouterr().out
    assert "7/7 raw" in shown and "0 control experiments" in shown and (copied / "claims.png").exists()
    base = torch.load(copied / "run.pt")["pretrain"]
    for flag in ("--cotrain", "--force_open"):
        (controls / flag).mkdir(parents=True)
        torch.save({"pretrain": base}, controls / flag / "run.pt")
        for phase in ("discover", "rl"):
            assert run_main(controls / flag, flag, "true", "--no-figures", "--phase", phase) == 0
    kept = torch.load(controls / "--cotrain" / "run.pt")["pretrain"]["model"]
    assert not torch.equal(kept["embed.agent"], base["model"]["embed.agent"])
    assert run_main(copied, *claims, str(controls)) == 0 and {claim.call_count for claim in quick.values()} == {1}
    found = json.loads((copied / "claims.json").read_text())["controls"]
    assert [*found] == ["controls", "rate"] and not found["controls"]["holds"]  # as this run itself fails
    counts = {name: len(runs) for name, runs in found["controls"]["numbers"].items()}
    assert counts == {"frozen": 1, "gate forced open": 1, "co-trained": 1}
    assert {name: len(runs) for name, runs in found["rate"]["numbers"].items()} == {"frozen": 1, "co-trained": 1}
    assert all(contents(copied)[name] == content for name, content in before.items())
    (controls / "--cotrain" / "config.json").unlink()
    assert run_main(copied, *claims, str(controls)) == 2 and "config.json" in one_line(capsys)
    torch.save({"pretrain": base}, copied / "run.pt")
    assert run_main(copied, *claims, "none", "--no-figures") == 2 and "--phase discover" in one_line(capsys)


def test_watching_a_trained_run(copied, capsys):
    """Each step shows the cells, the task with the visits done, the code in force, | where the gate opened; each
    episode where the last step led, its end and a count. --gif writes an animation of it."""
    flags = "--phase watch --fps 0 --watch_episodes 2 --gif".split()
    assert run_main(copied, *flags, str(copied / "a.gif")) == 0 and (copied / "a.gif").stat().st_size > 1000
    shown = capsys.readouterr().out
    steps = [int(n) for n in re.findall(r"^step (\d+), task \[?0\]? ", shown, re.M)]
    codes = re.findall(r"^[.|] code [0-3], gate [01]\.\d\d$", shown, re.M)
    assert steps.count(0) == 2 and len(codes) == len(steps) - 2
    assert len(re.findall(r"^([0-3#@*.] ){4}[0-3#@*.]$", shown, re.M)) == 5 * len(steps)
    assert f"{copied / 'run.pt'}" in shown and re.search(r"^2: (not )?solved, .*; solved [012] of 2$", shown, re.M)
    assert len(re.findall(r"^\| code", shown, re.M)) >= 2 and shown.count("solved,") == 2


@pytest.mark.parametrize("typed", [["1", "x", "7", "", "2"], []])
def test_watching_by_hand(copied, capsys, typed, monkeypatch):
    """A person's numbers choose the codes, what is no number is asked for again, and the end of the input leaves with
    status 0. One code for good is what --code does, and a visit ends nothing then."""
    monkeypatch.setattr("builtins.input", asked := Mock(side_effect=[*typed, EOFError]))
    assert run_main(copied, *"--phase watch --fps 0 --by_hand --code_dim 3".split()) == 2  # another code
    picture = copied / "a.gif"
    assert run_main(copied, *"--phase watch --fps 0 --by_hand --watch_episodes 9 --gif".split(), str(picture)) == 0
    assert picture.exists() == bool(typed)
    shown = capsys.readouterr().out
    assert asked.call_count == len(typed) + 1 and shown.endswith("\nbye\n")
    assert not typed or re.findall(r"^\| code (\d)", shown, re.M) == ["1", "2"]
    assert run_main(copied, *"--phase watch --fps 0 --watch_episodes 3 --code 3".split()) == 0
    shown = capsys.readouterr().out
    assert {*re.findall(r"^[.|] code (\d)", shown, re.M)} == {"3"} and shown.count(": 20 steps") == 3
    without = torch.load(copied / "run.pt")
    torch.save({name: without[name] for name in ("pretrain", "discover")}, copied / "run.pt")  # codes need no policy
    assert run_main(copied, *"--phase watch --fps 0 --code 3".split()) == 0


def test_later_phases_can_begin_with_the_trained_run_of_the_clone(copied, tmp_path, capsys, monkeypatch):
    """In a folder without a run discovery takes the base of the trained run that comes with the code, if it fits, else
    says what does not; and that run is watched."""
    shipped = (copied / "run.pt").rename(tmp_path / "grid-classroom.pt")
    monkeypatch.setattr(ir, "SHIPPED", tmp_path)
    assert run_main(copied, *"--phase watch --fps 0 --watch_episodes 1".split()) == 0
    assert str(shipped) in capsys.readouterr().out
    new, other = tmp_path / "new", tmp_path / "other"
    assert run_main(new, "--phase", "discover", "--no-figures", "--kl_weight", "0.3") == 0
    assert [*torch.load(new / "run.pt")] == ["pretrain", "discover"] and results(new)["code_accuracy"] > 0
    assert run_main(other, "--phase", "discover", "--dim", "16") == 2
    assert "classroom.pt: made with --dim" in capsys.readouterr().err and not other.exists()


@pytest.mark.parametrize(
    "flags", ["--dim 16", "--rank 8", "--blind 0.4", "--temperature 2", "--raw_lr 1", "--seed 1", "", "alien"]
)
def test_checkpoint_of_another_run_is_refused(copied, capsys, flags):
    """A folder made with another value that its models depend on, a file that cannot be read or that another program
    wrote: status 2, one line that names it, nothing overwritten."""
    if flags in ("", "alien"):
        torch.save({"my_model": {"weight": torch.ones(3)}}, copied / "run.pt")
    if flags == "":
        (copied / "run.pt").write_bytes(b"nonsense")
    before, flags = contents(copied), flags.replace("alien", "").split()
    assert run_main(copied, *flags) == 2 and (flags or ["run.pt"])[0] in one_line(capsys)
    assert contents(copied) == before


@BOTH
@pytest.mark.parametrize("stage", ir.STAGES)
def test_a_checkpoint_is_checked_against_all_it_depends_on(stage, name, monkeypatch):
    """Every config field that a stage reads, to train its model or to measure it, is compared before its checkpoint is
    used again: it is not behind the stage's last one. Actions are sampled at --temperature where controllers steer the
    base, and at 1 where nobody does."""
    batch, part = envs.World.batch, ir.STAGES[stage]
    monkeypatch.setattr(envs.World, "batch", lambda world, *a, **k: batch(replace(world, limit=20), *a, **k))
    run = make_run(**SHORT, world=name, obs_loss=0.1, rl_episodes=16, rl_batch=8, temperature=0.37)
    models = {other: ir.STAGES[other].build(run.config).requires_grad_(False) for other in ir.STAGES}
    read, look = set(), object.__getattribute__
    monkeypatch.setattr(ir, "rollout", spy := Mock(wraps=ir.rollout))
    monkeypatch.setattr(ir.Config, "__getattribute__", lambda c, field: read.add(field) or look(c, field))
    part.measure(run, part.train(run, *(models[need] for need in part.needs)), models)
    names = [*ir.Config.__dataclass_fields__]
    assert "eval_episodes" in read and read & {*names[names.index(part.last) + 1 :]} == set()
    assert {call.args[2].temperature for call in spy.call_args_list} == {1 if stage in ("pretrain", "raw") else 0.37}


@pytest.mark.parametrize("flags", [
    "--colour 3", "--pre laptop", "--env maze", "--preset laptop --env ant", "--world small --env ant", "--world ant",
    "--rl_episodes 1e5", "--preset huge", "--world large", "--forget some", "--dim 0", "--dim 2", "--dim abc",
    "--dim 1.5", "--dim 8", "--dim 18", "--layers -1", "--control_block 9", "--jumps 1.5", "--jumps -0.1",
    "--jumps nan", "--temperature 0", "--cotrain 2", "--shuffle maybe", "--rl_batch 0", "--seed -1", "--seed x",
    "--seed 1,1", "--seed 0,", "--seed 99999999999999999999", "--threads -1", "--threads 2000", "--threads x",
    "--device tpu", "--device cuda", "--pretrain_lr nan", "--pretrain_lr inf", "--pretrain_lr -1", "--obs_loss -1",
    "--obs_loss inf", "--kl_weight nan", "--init_scale 0", "--eval_episodes 2", "--eval_episodes 9999999999999",
    "--phase rl", "--fps 3", "--code 1", "--gif x.gif", "--by_hand", "--watch_episodes 2", "--code 4 --phase watch",
    "--code -1 --phase watch", "--fps nan --phase watch", "--watch_episodes 0 --phase watch", "--out file/below",
    "--gif walk --phase watch", "--gif no/walk.gif --phase watch", "--code 1 --by_hand --phase watch",
    "--seed 0,1 --phase watch",
    pytest.param("--out " + "x" * 300, id="--out too long"),
])  # fmt: skip
def test_impossible_values_are_refused(tmp_path, capsys, monkeypatch, flags):
    """Unknown flag, impossible value, a device or an earlier phase that is not there, an --out where no folder can be:
    status 2, one line that names the flag, nothing written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", Mock(side_effect=AssertionError))  # never start 2000
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    assert run_main("new", *flags.split()) == 2 and flags.split()[0] in one_line(capsys)
    assert contents(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("stage", ["pretrain", "discover", "steer"])
def test_a_run_that_diverges_fails_clearly(copied, capsys, stage, monkeypatch):
    """Numbers that become infinite, or a metric that is none: status 1, one line, that phase is not saved."""
    flags, saved = ["--phase", ir.STAGES[stage].phase, f"--{stage}_lr", "1e6"], torch.load(copied / "run.pt")
    before = {name: saved[name] for name in ir.STAGES[stage].needs}
    torch.save(before, copied / "run.pt")
    if stage == "steer":
        flags, bad = [], ir.STAGES["steer"]._replace(measure=lambda *arguments: {"steer_success": math.nan})
        monkeypatch.setitem(ir.STAGES, "steer", bad)
    assert run_main(copied, *flags) == 1
    assert "finite" in one_line(capsys) and [*torch.load(copied / "run.pt")] == [*before]


@BOTH
def test_reinforcement_that_diverges_fails_clearly(name):
    """A policy loss that is no number, and action probabilities that are none, are failed runs too."""
    run, base, _, policy = make_players(name, rl_batch=64, rl_episodes=64)
    play, _ = bandit(run, policy)
    broken = lambda inputs, chosen: math.nan * policy(inputs)[0].mean.sum(-1)
    base.norm.weight.fill_(math.nan)
    for call in (
        lambda: ir.reinforce(run, "rl", policy, 1e-3, play, broken),
        lambda: ir.play_actions(run, base, 8, np.random.default_rng(0)),
    ):
        with pytest.raises(ir.Failure, check=lambda failure: failure.status == 1):
            call()


def test_help_explains_every_field_and_presets_are_possible():
    """The comment beside each field of Config is in --help under the field's flag, with its default. No preset is
    refused when its own values are given as flags, fast or not."""
    comments, text = ir.config_comments(), re.sub(r"\W", "", ir.make_parser().format_help())
    assert list(comments) == [f.name for f in fields(ir.Config)]
    for f in fields(ir.Config):
        choices = ir.CHOICES.get(f.name, ir.CHOICES.get(f.type))
        kind = f"{{{','.join(choices)}}}" if choices else type(f.default).__name__.upper()
        said = f"--{f.name} {kind} {comments[f.name]} [{f.default}]"
        assert re.sub(r"\W", "", said) in text
    for env, name in ((env, name) for env, presets in ir.PRESETS.items() for name in presets):
        for fast in ([], ["--fast"]):
            flags = ["--env", env, "--preset", name, *fast]
            config = ir.make_config(ir.make_parser().parse_args(flags))
            values = [f"--{field}={value}" for field, value in asdict(config).items()]
            assert ir.make_config(ir.make_parser().parse_args(flags + values)) == config


def test_readme_mentions_only_what_exists():
    """Every --flag of the README (but pip's) is in --help, every file under results/ that it names exists, each test
    that it names for an exercise is one here, and each function one of internal_rl.py. It lists the sections of
    that file that have a place in the paper, in order."""
    text = "\n".join(line for line in source("README.md").splitlines() if "pip install" not in line)
    flags = lambda text: set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert flags(text) - flags(ir.make_parser().format_help()) == set()
    assert [name for name in re.findall(r"results/[\w./-]*\.\w+", text) if not (HERE / name).exists()] == []
    exercises, tests = re.findall(r"^\| `([\w.]+)` .* -k (\w+)` \|$", text, re.M), source("test_internal_rl.py")
    assert len(exercises) == 6
    for function, name in exercises:
        assert re.search(rf"def test_\w*{name}", tests)
        assert callable(functools.reduce(getattr, function.split("."), ir))
    sections = re.findall(r"^# -{90,}\n# (.*) \(paper: (.*?)\)?$", source("internal_rl.py"), re.M)
    named = "; ".join(f"*{title}* ({paper})" for title, paper in sections)
    assert len(sections) >= 7 and named in " ".join(source("README.md").split())


def shown(seeds: list[dict], key: str) -> str:
    """A result as the README's table has it: median and range over the seeds, nothing where a seed lacks it."""
    values = [metrics[key] for metrics in seeds if key in metrics]
    if len(values) < len(seeds):
        return ""
    digits = lambda x: ".0f" if abs(x) > 10 else ".1e" if 0 < abs(x) < 1e-3 else ".3f"
    low, middle, high = (format(x, digits(x)) for x in np.quantile(values, (0, 0.5, 1)))
    return middle if low == high else f"{middle} ({low} to {high})"


def test_numbers_of_the_readme():
    """The table of results has, for each key that it names, the numbers of results/*.json; the sentence about the
    seeds that chose nothing has theirs."""
    rows = re.findall(r"^\|[^|]*\(`(\w+)`\) \|(.*?)\|(.*?)\|(.*?)\|.*\|$", source("README.md"), re.M)
    assert len(rows) >= 12
    for i, name in enumerate(("grid-classroom", "grid-laptop", "ant-classroom")):
        seeds = json.loads(source(f"results/{name}.json"))["seeds"]
        assert {row[0]: row[1 + i].strip() for row in rows} == {row[0]: shown(seeds, row[0]) for row in rows}
    confirmed = json.loads(source("results/grid-classroom.json"))["confirmed"]["seeds"]
    assert [metrics["seed"] for metrics in confirmed] == [31, 32, 33]
    for key in ("internal_rl_success_normalised", "code_accuracy", "unseen_transition_probability"):
        assert f" {shown(confirmed, key)}," in source("README.md")


def saved_claims(name: str) -> dict:
    """{claim: what was found, for each seed (of all seeds together: where it needs other training)}."""
    saved = json.loads(source(f"results/{name}.json"))
    found = {name: [seed["claims"][name] for seed in saved["seeds"] if name in seed["claims"]] for name in ir.CLAIMS}
    return found | {name: [part] for name, part in saved["controls"].items()}


def check_numbers(told: str, parts: list[dict]) -> None:
    """Every number with a point that is told is one of those found, rounded: of one seed, or the median."""
    of_seeds = [re.findall(r"[\d.]+(?:e-\d+)?", json.dumps(part["numbers"])) for part in parts]
    numbers = [float(number) for seed in of_seeds for number in seed]
    if len({len(seed) for seed in of_seeds}) == 1:
        numbers += np.median(np.array(of_seeds, float), axis=0).tolist()
    for number, digits, power in re.findall(r"(\d*\.(\d+)(e-\d+)?)", told):
        form = f".{len(digits)}{'e' if power else 'f'}"
        assert number.lstrip("0") in {format(one, form).lstrip("0") for one in numbers}, (told, number)


def test_claims_of_the_readme():
    """The README has a row for each claim in results/claims.json, with the seeds on which it holds. The numbers in the
    row's third cell are those found. A second table has seed 0 of the 7x7 grid and of the ant, with the verdicts."""
    found = saved_claims("claims")
    rows = re.findall(r"^\| `(\w+)`: [^|]*\|[^|]*\|([^|]*)\| (\d of \d|yes|no) \|$", source("README.md"), re.M)
    assert [name for name, *_ in rows] == [*found]
    for name, ours, holds in rows:
        check_numbers(ours, found[name])
        verdicts = [part["holds"] for part in found[name]]
        of_one = "yes" if verdicts[0] else "no"
        assert holds == (of_one if name in ir.CONTROLS else f"{sum(verdicts)} of {len(verdicts)}"), name
    rows = re.findall(rf"^\| `({'|'.join(found)})` \| ([^|]*) \| ([^|]*) \|$", source("README.md"), re.M)
    assert [name for name, *_ in rows] == [*found]
    for name, *cells in rows:
        for cell, other in zip(cells, ("claims-laptop", "claims-ant")):
            if parts := saved_claims(other).get(name):
                assert cell.startswith("holds" if parts[0]["holds"] else "does not hold")
                check_numbers(cell, parts)
            else:
                assert cell == "not measured"


@pytest.mark.parametrize(
    "env, preset, seed", [("grid", "classroom", 0), ("grid", "laptop", 0), ("ant", "classroom", 1)]
)
def test_the_trained_runs_of_the_clone_are_of_todays_presets(env, preset, seed):
    """The models in results/ are seed 0 (of the ant 1, the median) of the preset that the code has now, as is checked
    before they are watched."""
    assert seed == ir.SHIPPED_SEED.get(env, 0)
    if env == "ant":
        seeds = json.loads(source("results/ant-classroom.json"))["seeds"]
        success = {metrics["seed"]: metrics["internal_rl_success_normalised"] for metrics in seeds}
        assert success[seed] == np.median([*success.values()])
    run = ir.Run(ir.PRESETS[env][preset], seed, CPU, name=f"{env}-{preset}")
    assert ir.load_saved(run, "watch").parent.name == "results"
    assert all(ir.load_model(run, stage) for stage in ir.TRAINED)


def test_the_readmes_own_world_runs(tmp_path, monkeypatch):
    """The world that the README builds runs through all phases in a smoke run and leaves its results."""
    code = readme_code("import sys")
    for table in (envs.WORLDS, ir.EMBEDDINGS, ir.HEADS, ir.PRESETS):
        monkeypatch.setitem(table, "ice", None)  # gone again once this test is over
    monkeypatch.setattr(sys, "argv", [*"ice.py --fast --no-figures --threads 1 --out".split(), str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        exec(code, {"__name__": "ice"})
    assert end.value.code == 0 and results(tmp_path)["expert_success"] > 0.3


def test_the_readmes_use_from_python():
    """The README's lines that steer the run in the clone do so: nearly all visits are to the colour of the code."""
    exec(readme_code("import torch"), names := {})
    visited = names["visited"]
    assert (visited == 2).sum() > 0.9 * (visited >= 0).sum() > 200


def test_import_is_light():
    """Importing internal_rl prints nothing and imports neither matplotlib nor MuJoCo; `versions` needs neither."""
    code = (
        "import sys, internal_rl as ir; assert not {'matplotlib', 'mujoco'} & {*sys.modules};"
        "ir.importlib.metadata.distributions = lambda: []; assert ir.versions()['mujoco'] == 'not installed'"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.skipif(os.environ.get("RUN_SLOW") != "1", reason="trains for minutes: set RUN_SLOW=1")
def test_classroom_learns(tmp_path):
    """The classroom preset: switches find the true subgoal changes (precision and recall at least 0.9), and internal
    RL rises far above counting, to where raw-action RL does not come near."""
    assert ir.main(["--no-figures", "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert found["switch_precision"] >= 0.9 and found["switch_recall"] >= 0.9
    assert found["internal_rl_success"] > 1000 * found["counting_success"] and found["raw_rl_success"] < 0.05
