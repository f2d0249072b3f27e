"""Tests of envs.py and internal_rl.py, in the order of those files: each docstring is the claim that is checked.

`python -m pytest` takes less than a minute; `RUN_SLOW=1 python -m pytest -k learns` is the classroom run. Where the
claim is mathematics, the reference is written here once more and as plainly as possible: breadth-first search for the
expert, a sum over the 16 tasks for the Bayes predictor, e + U e for the controller.
"""

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields, replace
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

HERE = Path(__file__).parent
SMALL, PAPER = envs.TASK_SETS["small"], envs.TASK_SETS["paper"]
ENV_ID = "InternalRL/GridPinpad-v0"
ANT, ANT_ID = envs.ANT, "InternalRL/AntPinpad-v0"
WORLDS = pytest.mark.parametrize("world", [SMALL, PAPER], ids=["small", "paper"])
BLOCKS = pytest.mark.parametrize("block", ["hawk", "transformer"])
SUMMARIES = pytest.mark.parametrize("summary", ["backward", "whole"])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def generators():
    return np.random.default_rng(0), torch.Generator().manual_seed(0)


# ---- The rules of the grid -------------------------------------------------------------------------


def toy(task=(0, 1), limit=20, **options) -> envs.GridBatch:
    """One episode on this grid. Digits are colours, # a wall, @ the agent:   0 . 1     cells: 0 1 2
    .                                                                         . @ #            3 4 5
    .                                                                         2 . .            6 7 8"""
    world = envs.TaskSet(3, 3, 1, limit, ((0,), (1,), (2,)), (task,), task)
    return envs.GridBatch(world, envs.Layout(np.array([[0, 2, 6]]), np.array([[5]]), np.array([4])), [task], **options)


HAND_TRACED = {  # task, actions, options, cells, visits (-1: none), last reward, done at the end
    "a wall, two visits": ((0, 1), "RULRR", {}, [4, 1, 0, 1, 2], [-1, -1, 0, -1, 1], 1, True),
    "bumping into the border is no visit": ((0, 1, 2), "ULULR", {}, [1, 0, 0, 0, 1], [-1, 0, -1, -1, -1], 0, False),
    "bumping into a wall is no visit": ((1, 0), "URD", {}, [1, 2, 2], [-1, 1, -1], 0, False),
    "a wrong colour ends the episode": ((1, 0), "UL", {}, [1, 0], [-1, 0], 0, True),
    "also the colour visited last": ((0, 1), "ULRL", {}, [1, 0, 1, 0], [-1, 0, -1, 0], 0, True),
    "but not when roaming": ((1, 0), "UL", {"roam": True}, [1, 0], [-1, 0], 0, False),
    "the limit ends it": ((1,), "RRR", {"limit": 3}, [4, 4, 4], [-1, -1, -1], 0, True),
    "a solution in the last step pays": ((1,), "UR", {"limit": 2}, [1, 2], [-1, 1], 1, True),
}


@pytest.mark.parametrize("name", HAND_TRACED)
def test_hand_traced_episode(name):
    """Cells, visits, reward and end are those worked out by hand; only the last step has a reward or ends."""
    task, actions, options, cells, visits, reward, done = HAND_TRACED[name]
    batch, nothing = toy(task, **options), [0] * (len(cells) - 1)
    steps = [(*batch.step(np.array(["UDLR".index(action)])), batch.agent) for action in actions]
    expected = [visits, [*nothing, reward], [*nothing, done], cells]
    assert np.array(steps, dtype=float)[..., 0].T.tolist() == expected


def test_observation_shows_everything_but_the_goal():
    """(G, G, O + W + 1) row-major: each colour, wall and the agent has a single 1, at its cell; tasks look alike."""
    layout = envs.sample_layouts(PAPER, 5, np.random.default_rng(0))
    first, last = (envs.GridBatch(PAPER, layout, [task] * 5) for task in (PAPER.pretrain[0], PAPER.post))
    first.step(np.arange(5) % 4), last.step(np.arange(5) % 4)
    grid = first.observe().reshape(5, 7, 7, 8 + 4 + 1)
    for i in range(5):
        for channel, cell in enumerate([*layout.colours[i], *layout.walls[i], first.agent[i]]):
            assert np.argwhere(grid[i, :, :, channel]).tolist() == [list(divmod(cell, 7))]
    assert set(np.unique(grid)) == {0, 1} and np.array_equal(first.observe(), last.observe())


def test_layouts_are_distinct_and_uniform():
    """Every object lies on every cell equally often (within 5 standard deviations), and no two share a cell."""
    layouts = envs.sample_layouts(SMALL, 20_000, np.random.default_rng(0))
    cells = np.hstack([part.reshape(20_000, -1) for part in layouts])
    assert (np.diff(np.sort(cells, axis=1), axis=1) > 0).all()
    assert all(np.abs(np.bincount(cell, minlength=25) - 800).max() < 5 * math.sqrt(800) for cell in cells.T)


def test_task_tables_are_the_papers():
    """Tables A1 and A2 verbatim, the paper's sizes, and no post-training transition occurs in pretraining."""
    table_a1 = """0-1-4-5-0-1 0-1-4-5-2-3 0-1-6-7-2-3 2-3-0-1-4-5 2-3-6-7-2-3 2-3-6-7-4-5 4-5-0-1-4-5 4-5-0-1-6-7
        4-5-2-3-6-7 6-7-2-3-0-1 6-7-2-3-6-7 6-7-4-5-0-1 0-1-6-7-4-5 2-3-0-1-6-7 4-5-2-3-0-1 6-7-4-5-2-3"""
    table_a2 = "0-3-2 1-0-3 2-1-0 3-2-1 0-2-0 0-2-1 0-3-1 1-0-2 1-3-1 1-3-2 2-0-2 2-0-3 2-1-3 3-1-0 3-1-3 3-2-0"
    for world, table in ((PAPER, table_a1), (SMALL, table_a2)):
        assert ["-".join(map(str, task)) for task in world.pretrain] == table.split()
    assert (PAPER.size, PAPER.colours, PAPER.walls, PAPER.limit) == (7, 8, 4, 100)
    assert "-".join(map(str, PAPER.post)) == "0-1-2-3-4-5-6-7-0-1-2-3"
    pairs = {task[i : i + 4] for task in PAPER.pretrain for i in (0, 2)}
    assert not pairs & {(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7), (6, 7, 0, 1)}
    singles = {task[i : i + 2] for task in SMALL.pretrain for i in (0, 1)}
    assert not singles & {SMALL.post[i : i + 2] for i in range(5)}
    assert PAPER.transitions(PAPER.post) == {(0, 1), (1, 2), (2, 3), (3, 0)} and PAPER.counting_success == 4**-6


# ---- The Gymnasium environment ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "ansi", "rgb_array"])
def test_check_env_has_no_complaint(mode):
    """Gymnasium's own checker passes with every warning turned into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ENV_ID, render_mode=mode).unwrapped)


def test_default_env_is_the_papers_and_seeded():
    """gym.make without arguments is the 7x7 post-training task with 637 observations and 100 steps. A seed decides
    the whole episode and the next one, reset without a seed; another seed gives others."""
    env = gymnasium.make(ENV_ID)
    assert (env.unwrapped.world.post, env.unwrapped.world.limit, env.action_space.n) == (PAPER.post, 100, 4)
    moves = (0, 2, 1, 3) * 4
    episodes = [[env.reset(seed=seed)[0], *(env.step(a)[0] for a in moves), env.reset()[0]] for seed in (3, 3, 4)]
    first, same, other = np.array(episodes)
    assert first.shape == (18, 637) and env.observation_space.shape == (637,)
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_env_is_the_view_of_a_batch_of_one():
    """The env's observations, rewards and ends are those of GridBatch on the same layouts with the same actions."""
    env = gymnasium.make(ENV_ID, size=3, colours=3, walls=1, limit=12, task=(0, 2))
    rng, rewards = np.random.default_rng(0), set()
    for seed in range(60):
        cells = env.reset(seed=seed)[0].reshape(9, 5).argmax(axis=0)[None]  # the cell of each object
        batch = envs.GridBatch(env.unwrapped.world, envs.Layout(cells[:, :3], cells[:, 3:4], cells[:, 4]), [(0, 2)])
        over = False
        while not over:
            action = rng.integers(4)
            obs, reward, over, truncated, info = env.step(action)
            _, expected, done = batch.step(np.array([action]))
            assert (reward, over, info["subgoal"]) == (expected[0], done[0], batch.subgoal()[0])
            assert np.array_equal(obs, batch.observe()[0]) and truncated is False
        rewards.add(reward)
    assert rewards == {0.0, 1.0} and type(reward) is float and type(over) is bool


@pytest.mark.parametrize("arguments, named", [
    ({"size": 3, "colours": 8, "walls": 4}, "size"), ({"size": 1}, "size"), ({"colours": 0}, "colours"),
    ({"walls": -1}, "walls"), ({"limit": 0}, "limit"), ({"task": (0, 8)}, "task"), ({"task": ()}, "task"),
    ({"task": (0, 0)}, "task"), ({"render_mode": "human"}, "render_mode"),
])  # fmt: skip
def test_impossible_worlds_are_refused(arguments, named):
    """An argument that makes no grid or no task is a ValueError that names it."""
    with pytest.raises(ValueError, match=named):
        envs.GridPinpad(**arguments)


def test_rendering():
    """ansi draws digits, # and @, or * for an agent on a colour; rgb_array has 24 pixels a cell and a black agent."""
    batch = toy()
    assert envs.grid_text(batch.world, batch.content[0], 4) == "0 . 1\n. @ #\n2 . .\n"
    assert envs.grid_text(batch.world, batch.content[0], 0) == "* . 1\n. . #\n2 . .\n"
    env = gymnasium.make(ENV_ID, render_mode="rgb_array")
    agent = int(env.reset(seed=0)[0].reshape(49, 13)[:, 12].argmax())
    picture = env.render()
    assert picture.shape == (168, 168, 3) and picture.dtype == np.uint8
    row, column = np.nonzero((picture == 0).all(axis=-1))
    assert len(row) == 12 * 12 and set(row // 24 * 7 + column // 24) == {agent}


# ---- The expert, against breadth-first search ------------------------------------------------------


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


def best_moves(world, colours, walls, agent, goal):
    """Uniform over the moves that start a shortest path to colour `goal`, (4,); zeros where there is no path."""
    obstacles = frozenset(int(cell) for cell in (*colours, *walls)) - {int(colours[goal])}
    steps = search(world.size, obstacles, int(colours[goal]))
    after = [walk(world.size, int(agent), action) for action in range(4)]
    reach = np.array([steps.get(cell, math.inf) if cell != agent else math.inf for cell in after])
    best = (reach == reach.min()) & (reach < math.inf)
    return best / max(1, best.sum())


def can_be_solved(world, colours, walls, agent, task):
    places = [agent, *(colours[goal] for goal in task)]
    return all(best_moves(world, colours, walls, place, goal).any() for place, goal in zip(places, task))


def expert(count, world=SMALL, **options) -> envs.Episodes:
    return envs.expert_episodes(world, world.pretrain, count, np.random.default_rng(0), **options)[0]


@WORLDS
@pytest.mark.parametrize("disturbance", ["none", "noise", "displace", "on_colour"])
def test_expert(world, disturbance):
    """Labels are uniform over shortest-path moves to the goal, whatever disturbs the walk; the walk obeys the rules,
    visits the colours of its task and no other, and ends with the last. `noise` takes other actions than the labels
    say but keeps the labels clean; `displace` jumps, sometimes onto a colour that is not the goal (which is no visit),
    but keeps every action an expert's; `on_colour` starts on a colour that is not the first goal. All chance comes
    from the generator that is passed in: numpy's global one is left alone."""
    chance = np.random.get_state()[1].copy()
    data = expert(60, world, **({} if disturbance == "none" else {disturbance: 0.2}))
    jumps = strays = jumps_on_colours = starts_on_colours = 0
    for i in range(60):
        steps, task, visits = int(data.mask[i].sum()), world.pretrain[data.task[i]], ()
        colours, walls = data.colours[i].tolist(), data.walls[i].tolist()
        starts_on_colours += data.agent[i, 0] in colours
        assert data.agent[i, 0] not in (*walls, colours[task[0]])
        assert data.mask[i, :steps].all() and (data.goal[i, steps:] == -1).all() and not data.expert[i, steps:].any()
        for t in range(steps):
            cell, action, goal = data.agent[i, t], data.actions[i, t], task[len(visits)]
            label = best_moves(world, colours, walls, cell, goal)
            assert np.allclose(data.expert[i, t], label) and data.goal[i, t] == goal
            strays += label[action] == 0
            after = walk(world.size, cell, action)
            after = cell if after in walls else after
            if after != cell and after in colours:
                visits += (colours.index(after),)
            if after != data.agent[i, t + 1]:
                jumps += 1
                jumps_on_colours += data.agent[i, t + 1] in colours
                assert data.agent[i, t + 1] not in (*walls, colours[task[len(visits)]])
        assert visits == task and (data.agent[i, steps:] == colours[task[-1]]).all()
    assert (jumps > 0, strays > 0) == (disturbance == "displace", disturbance == "noise")
    assert (jumps_on_colours > 0, starts_on_colours > 0) == (disturbance == "displace", disturbance == "on_colour")
    assert np.array_equal(chance, np.random.get_state()[1])


def test_expert_breaks_ties_uniformly():
    """Where two moves are shortest, each is taken equally often (within 4 standard deviations)."""
    data = expert(2000)
    tied = data.mask & ((data.expert > 0).sum(axis=-1) == 2)
    first = data.actions[tied] == data.expert[tied].argmax(axis=-1)
    assert len(first) > 1000 and abs(first.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(first))


@WORLDS
def test_solvability_is_exact_and_its_share_reported(world):
    """`solvable` is right on every layout, the share of draws dropped is reported, the env's option is heeded."""
    rng = np.random.default_rng(1)
    layout, task = envs.sample_layouts(world, 400, rng), rng.integers(16, size=400)
    padded, lengths = envs.pad_tasks(world.pretrain)
    found = envs.solvable(envs.distance_fields(world, layout), layout, padded[task], lengths[task])
    expected = [can_be_solved(world, *layout.take(i), world.pretrain[task[i]]) for i in range(400)]
    assert found.tolist() == expected
    share, reported = 1 - np.mean(expected), envs.expert_episodes(world, world.pretrain, 2000, rng)[1]
    assert abs(share - reported) < 4 * math.sqrt(share / 400)
    env = gymnasium.make(ENV_ID, size=4, colours=4, walls=3, task=(0, 1, 2, 3)).unwrapped
    for seed in range(20):
        cells = env.reset(seed=seed, options={"solvable": True})[0].reshape(16, 8).argmax(axis=0)
        assert can_be_solved(env.world, cells[:4], cells[4:7], cells[7], (0, 1, 2, 3))


def bayes_by_hand(world, tasks, data, i):
    """The Bayes predictor of episode i, task by task: replay it under each task and weigh the tasks' experts."""
    colours, walls, visits, predictions = data.colours[i].tolist(), data.walls[i].tolist(), (), []
    weight = np.array([float(can_be_solved(world, colours, walls, data.agent[i, 0], task)) for task in tasks])
    for t in range(data.mask[i].sum()):  # only tasks with these visits go on, and a solved one ends the episode
        weight = weight * [len(task) > len(visits) and task[: len(visits)] == visits for task in tasks]
        goals = [task[len(visits)] if w else 0 for task, w in zip(tasks, weight)]
        experts = np.stack([best_moves(world, colours, walls, data.agent[i, t], goal) for goal in goals])
        predictions.append(weight @ experts / weight.sum())
        weight = weight * experts[:, data.actions[i, t]]
        if data.agent[i, t + 1] != data.agent[i, t] and data.agent[i, t + 1] in colours:
            visits += (colours.index(data.agent[i, t + 1]),)
    return np.stack(predictions)


MIXED = ((0, 1), (0, 1, 2), (0, 3, 1), (2, 0, 3), (2, 0))  # some are beginnings of others


@pytest.mark.parametrize("world, tasks", [(SMALL, SMALL.pretrain), (PAPER, PAPER.pretrain), (SMALL, MIXED)])
def test_bayes_predictor_equals_brute_force(world, tasks):
    """The predictor equals the sum over all tasks of p(task | moves so far) times that task's expert."""
    data = envs.expert_episodes(world, tasks, 24, np.random.default_rng(0))[0]
    found = envs.bayes_predictor(world, tasks, data)
    for i in range(24):
        expected = bayes_by_hand(world, tasks, data, i)
        assert np.allclose(found[i, : len(expected)], expected, atol=1e-6) and not found[i, len(expected) :].any()


@WORLDS
def test_not_knowing_the_task_costs_at_most_ln_16(world):
    """The Bayes floor lies above the expert's own entropy by at most what one of 16 tasks can tell (and chance)."""
    data = expert(2048, world)
    assert 1 < ir.bayes_floor(world, data) - ir.expert_entropy(data) <= math.log(16) + 0.05


def test_mirrors_are_the_symmetries_of_the_square():
    """8 different maps that keep neighbours neighbours; a mirrored expert trajectory is an expert trajectory."""
    table, data = envs.mirror_table(5), expert(8)
    assert len({tuple(row) for row in table}) == 8 and np.array_equal(table[0], np.arange(25))
    for mirror in table:
        assert sorted(mirror) == list(range(25))
        around = [walk(5, 12, action) for action in range(4)]  # of the centre, which stays in place
        turned = [around.index(mirror[cell]) for cell in around]  # what the mirror makes of the four moves
        for i in range(8):
            colours, walls, agent = mirror[data.colours[i]], mirror[data.walls[i]], mirror[data.agent[i]]
            for t in range(int(data.mask[i].sum())):
                assert walk(5, agent[t], turned[data.actions[i, t]]) == agent[t + 1]
                label = best_moves(SMALL, colours, walls, agent[t], data.goal[i, t])
                assert np.allclose(label[turned], data.expert[i, t])


# ---- The rules of the ant --------------------------------------------------------------------------

STILL = np.zeros((1, 8))


def toy_ant(task=(0, 1), limit=20, **options) -> envs.AntBatch:
    """One episode on this grid, the ant at the centre of its cell:    0 . 1    cells: 0 1 2
    digits are colours, # a wall, @ the ant.                           . @ #           3 4 5
                                                                       2 . .           6 7 8"""
    world = envs.TaskSet(3, 3, 1, limit, ((0,), (1,), (2,)), (task,), task)
    layout = envs.Layout(np.array([[0, 2, 6]]), np.array([[5]]), np.array([4]))
    batch = envs.AntBatch(world, layout, [task], np.random.default_rng(0), **options)
    batch.state[:, envs.XY] = 0
    return batch


PLACES = {cell: (1.25 * (cell % 3 - 1), 1.25 * (1 - cell // 3)) for cell in range(9)}
OFF_GRID = {"north of 1": (0, 30), "east of 2": (2.5, 1.25), "north of 0": (-1.25, 9), "south-west of 6": (-9, -9)}
ANT_TRACED = {  # task, places, options, cells, visits (-1: none), last reward, done at the end
    "two visits": ((0, 1), [1, 0, 1, 2], {}, [1, 0, 1, 2], [-1, 0, -1, 1], 1, True),
    "staying on a colour is no visit": ((0, 1, 2), [1, 0, 0, 0], {}, [1, 0, 0, 0], [-1, 0, -1, -1], 0, False),
    "a wrong colour ends the episode": ((1, 0), [1, 0], {}, [1, 0], [-1, 0], 0, True),
    "also the colour visited last": ((0, 1), [1, 0, 1, 0], {}, [1, 0, 1, 0], [-1, 0, -1, 0], 0, True),
    "but not when roaming": ((1, 0), [1, 0], {"roam": True}, [1, 0], [-1, 0], 0, False),
    "a wall ends it": ((0, 1), [4, 5], {}, [4, 5], [-1, -1], 0, True),
    "also when roaming": ((0, 1), [4, 5], {"roam": True}, [4, 5], [-1, -1], 0, True),
    "leaving the grid does not": ((1, 0), [1, "north of 1"], {}, [1, 1], [-1, -1], 0, False),
    "there the cells go on": ((1, 2), [1, "east of 2", "south-west of 6"], {}, [1, 2, 6], [-1, 1, 2], 1, True),
    "also the wrong ones": ((1, 0), ["north of 0"], {}, [0], [0], 0, True),
    "the limit ends it": ((1,), [4, 1, 4], {"limit": 3}, [4, 1, 4], [-1, -1, -1], 0, True),
    "a solution in the last step pays": ((1,), [1, 2], {"limit": 2}, [1, 2], [-1, 1], 1, True),
}


@pytest.mark.parametrize("name", ANT_TRACED)
def test_hand_traced_ant(name):
    """Of an ant that is put from place to place, cells, visits, reward and end are those worked out by hand."""
    task, places, options, cells, visits, reward, done = ANT_TRACED[name]
    batch, nothing, steps = toy_ant(task, **options), [0] * (len(cells) - 1), []
    for place in places:
        batch.state[:, envs.XY] = {**PLACES, **OFF_GRID}[place]
        steps.append([*batch.step(STILL), batch.cell])
    expected = [visits, [*nothing, reward], [*nothing, done], cells]
    assert np.array(steps, dtype=float)[..., 0].T.tolist() == expected


@pytest.mark.parametrize("height, done", [(0.19, True), (0.21, False), (0.99, False), (1.01, True)])
@pytest.mark.parametrize("roam", [False, True])
def test_height_ends_the_episode(height, done, roam, monkeypatch):
    """A torso outside [0.2, 1.0] m ends the episode, roaming or not, with time stopped so that it stays there."""
    monkeypatch.setattr(envs, "ant_simulate", lambda state, torques, threads: state)
    batch = toy_ant(roam=roam)
    batch.state[:, envs.HEIGHT] = height
    assert batch.step(STILL)[2].tolist() == [done]


def test_upside_down_is_seen_but_ends_nothing():
    """An ant turned over is within the height range and not upright; the paper does not end the episode."""
    batch = toy_ant()
    assert batch.upright().all()
    batch.state[:, envs.QUATERNION] = (0, 1, 0, 0)
    _, _, done = batch.step(STILL)
    assert not done and not batch.upright().any()


@pytest.mark.parametrize("what", ["velocity", "torque"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e4])
def test_divergence_ends_one_episode_and_is_counted(what, value, tmp_path, monkeypatch):
    """State or torques that are not finite, or a state too large, end that episode without reward, are counted, and
    leave finite observations; the other episodes do not notice. A torque that is merely large is clipped."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it stands
    layout = envs.sample_layouts(ANT, 3, np.random.default_rng(0))
    sick, well = (envs.AntBatch(ANT, layout, [ANT.post] * 3, np.random.default_rng(1)) for _ in range(2))
    torques = np.zeros((3, 8))
    well.step(torques)
    if what == "velocity":
        sick.state[1, 20] = value
    else:
        torques[1, 3] = value
    diverges = what == "velocity" or not np.isfinite(value)
    visited, reward, done = sick.step(torques)
    assert done.tolist() == [False, diverges, False] and not reward.any() and (visited == -1).all()
    assert sick.diverged == diverges and np.isfinite(sick.observe()).all()
    assert np.array_equal(sick.state[[0, 2]], well.state[[0, 2]])


# ---- Physics and batches ---------------------------------------------------------------------------


def random_ants(count=6, seed=0) -> envs.AntBatch:
    rng = np.random.default_rng(seed)
    return envs.AntBatch(ANT, envs.sample_layouts(ANT, count, rng), [ANT.post] * count, rng)


def test_simulation_is_five_plain_steps():
    """One control step is five mj_step of 0.01 s with the torques held and clipped, actuators leg 4 first."""
    import mujoco

    model = envs.ant_physics(1)[0]
    joints = [model.joint(model.actuator_trnid[i, 0]).name for i in range(8)]
    assert joints == [f"{part}_{leg}" for leg in (4, 1, 2, 3) for part in ("hip", "ankle")]
    state, torques = random_ants().state, np.random.default_rng(1).uniform(-2, 2, (6, 8))
    for before, torque, after in zip(state, torques, envs.ant_simulate(state, torques)):
        data = mujoco.MjData(model)
        data.qpos, data.qvel, data.ctrl = before[1:16], before[16:], torque.clip(-1, 1)
        for _ in range(5):
            mujoco.mj_step(model, data)
        assert np.allclose([data.time, *data.qpos, *data.qvel], after, atol=1e-9) and after[0] == pytest.approx(0.05)


def test_batch_equals_single_episodes_and_select_keeps_them():
    """Six episodes together, then three of them after `select`, on one thread or two, go as each one alone."""
    rng, kept = np.random.default_rng(2), np.array([4, 0, 3])
    torques = rng.uniform(-1, 1, (8, 6, 8))
    batch, threaded = random_ants(), random_ants()
    threaded.threads = 2
    alone = [random_ants() for _ in range(6)]
    for i, single in enumerate(alone):
        single.select([i])
    for t in range(8):
        if t == 4:
            batch.select(kept), threaded.select(kept)
        rows = np.arange(6) if t < 4 else kept
        results = [np.array(b.step(torques[t, rows])) for b in (batch, threaded)]
        single = np.concatenate([alone[i].step(torques[t, [i]]) for i in rows], axis=1)
        assert np.array_equal(results[0], single) and np.array_equal(results[1], single)
        assert np.array_equal(batch.observe(), np.concatenate([alone[i].observe() for i in rows]))
        assert np.array_equal(batch.observe(), threaded.observe())
    assert len(batch) == 3 and np.array_equal(batch.goal(), [0, 0, 0]) and batch.time.tolist() == [8, 8, 8]


def test_start_is_as_the_paper_says():
    """On a free cell, anywhere in it, any yaw, joints and rates within 0.1 of standing (ankles 1 rad out), at rest."""
    batch = random_ants(2000)
    assert (batch.content[np.arange(2000), batch.cell] == -1).all()
    assert np.array_equal(batch._cell_of(batch.state[:, envs.XY]), batch.cell)
    local = batch.observe()[:, envs.ant_slices(ANT)["local"]]
    standing = np.tile([0, 1, 0, -1, 0, -1, 0, 1], (2000, 1))
    spread = [local, envs.yaw_of(batch.state)[:, None] / np.pi]
    spread += [(batch.state[:, envs.JOINTS] - standing) / 0.1, batch.state[:, envs.JOINT_RATES] / 0.1]
    for part in spread:  # uniform on [-1, 1]: mean 0, variance 1/3, within 5 standard deviations
        assert np.abs(part).max() <= 1 and np.abs(part.mean(axis=0)).max() < 5 * (1 / 3 / 2000) ** 0.5
        assert np.abs((part**2).mean(axis=0) - 1 / 3).max() < 5 * (4 / 45 / 2000) ** 0.5
    assert not batch.state[:, 16:22].any() and (batch.state[:, envs.HEIGHT] == 0.55).all()


def test_ant_observation_shows_everything_but_the_goal():
    """Each part of `ant_slices` is what the table says, worked out here from state and layout; tasks look alike."""
    layout = envs.sample_layouts(ANT, 5, np.random.default_rng(0))
    torques = np.random.default_rng(1).uniform(-1, 1, (5, 8))
    first, last = (
        envs.AntBatch(ANT, layout, [task] * 5, np.random.default_rng(2)) for task in (ANT.pretrain[0], ANT.post)
    )
    first.step(torques), last.step(torques)
    obs, parts = first.observe(), envs.ant_slices(ANT)
    assert np.array_equal(obs, last.observe()) and obs.shape == (5, 41) and obs.dtype == np.float32
    assert [part.start for part in parts.values()] + [41] == [0, 1, 5, 13, 27, 29, 39, 41]

    def unsymlog(name):
        return np.sign(obs[:, parts[name]]) * np.expm1(np.abs(obs[:, parts[name]]))

    state = np.concatenate([unsymlog(name) for name in ("height", "orientation", "joints", "velocity")], axis=1)
    assert np.allclose(state, first.state[:, 3:], rtol=1e-4, atol=1e-5)
    for i, (x, y) in enumerate(first.state[:, envs.XY]):
        assert np.allclose(obs[i, parts["xy"]], (x / 2.5, y / 2.5), atol=1e-6)
        for j, cell in enumerate([*layout.colours[i], *layout.walls[i]]):
            row, column = divmod(cell, 4)
            thing = (-1.875 + 1.25 * column - x) / 2.5, (1.875 - 1.25 * row - y) / 2.5
            assert np.allclose(obs[i, parts["things"]][2 * j : 2 * j + 2], thing, atol=1e-6)
        corner = np.floor(x / 1.25) * 1.25, np.floor(y / 1.25) * 1.25
        local = 2 * (np.array([x, y]) - corner) / 1.25 - 1
        assert np.allclose(obs[i, parts["local"]], local, atol=1e-5)


# ---- The expert ------------------------------------------------------------------------------------


@functools.cache
def expert_data(noise=0.0):
    return envs.ant_expert_episodes(ANT, ANT.pretrain, 50, np.random.default_rng(0), noise=noise, chunk=32)


def test_routes_are_shortest_paths():
    """Each route takes as many cells as the distance field says; a tie is decided by the goal alone, and in a world
    turned to the left by the turned goal, but for opposite ways in line with it."""
    layout = envs.sample_layouts(ANT, 200, np.random.default_rng(0))
    turned = envs.Layout(*(envs.mirror_table(4)[1][part] for part in layout))
    fields = [envs.distance_fields(ANT, where) for where in (layout, turned)]
    routes, others = (np.stack([envs.ant_routes(f, np.random.default_rng(s)) for s in range(8)]) for f in fields)
    neighbour, fixed, opposite = envs.neighbour_table(4), 0, 0
    for i, colour, cell in np.argwhere((fields[0] > 0) & (fields[0] < envs.FAR)):
        best = {c for c in neighbour[cell] if fields[0][i, colour, c] == fields[0][i, colour, cell] - 1}
        after = set(routes[:, i, colour, cell])
        goal = layout.colours[i, colour]
        row = best == {cell - 1, cell + 1} and goal // 4 == cell // 4
        chance = row or (best == {cell - 4, cell + 4} and goal % 4 == cell % 4)
        assert after <= best and (len(after) == 1 or chance)
        if len(best) > 1 and not chance:
            assert set(others[:, i, colour, envs.mirror_table(4)[1][cell]]) == {envs.mirror_table(4)[1][after.pop()]}
            fixed, opposite = fixed + 1, opposite + (best in ({cell - 1, cell + 1}, {cell - 4, cell + 4}))
    assert fixed > 100 and opposite > 10


@pytest.mark.parametrize("direction", [0.0, 2.0, -2.5])
def test_trot_goes_where_it_should(direction):
    """In 5 seconds an ant of any yaw walks 1.5 m or more in the direction asked for, within 0.3 rad, upright."""
    batch = random_ants(8)
    start = batch.state[:, envs.XY].copy()
    for _ in range(100):
        batch.state = envs.ant_simulate(batch.state, envs.trot(batch.state, np.full(8, direction)))
    dx, dy = (batch.state[:, envs.XY] - start).T
    assert np.hypot(dx, dy).min() > 1.5 and batch.upright().all()
    assert np.abs(np.angle(np.exp(1j * (np.arctan2(dy, dx) - direction)))).max() < 0.3


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_ant_expert_solves_its_tasks(noise):
    """At least 9 of 10 episodes succeed; each kept one visits, by its recorded places alone, just the colours of its
    task in order and no wall; some layouts are unsolvable, and that share is reported."""
    data, unsolvable, success = expert_data(noise)
    assert success >= 0.9 and 0 < unsolvable < 0.3 and len(data.task) == 50
    for i, steps in enumerate(data.lengths()):
        x, y = data.xy(ANT)[i, : steps + 1].T
        cells = np.clip((2.5 - y) // 1.25, 0, 3) * 4 + np.clip((x + 2.5) // 1.25, 0, 3)
        entered = cells[1:][np.diff(cells) != 0].astype(int).tolist()
        names = dict(zip(data.colours[i].tolist(), range(4)))
        assert [names[cell] for cell in entered if cell in names] == list(ANT.pretrain[data.task[i]])
        assert data.walls[i, 0] not in entered
        pursued = data.goal[i, :steps]
        assert pursued[np.flatnonzero(np.diff(pursued, prepend=-2))].tolist() == list(ANT.pretrain[data.task[i]])


def test_ant_episodes_are_padded_and_reproducible():
    """The mask is True on the first steps and no others, padding is zeros and -1, the same generator gives the same
    data, and `take` cuts the padding to the longest episode taken."""
    data, _, _ = expert_data()
    again, _, _ = expert_data.__wrapped__()
    assert all(np.array_equal(a, b) for a, b in zip(data, again))
    steps = np.arange(data.mask.shape[1])
    assert np.array_equal(data.mask, steps < data.lengths()[:, None]) and data.lengths().max() == len(steps)
    assert data.obs.dtype == data.actions.dtype == np.float32 and data.obs.shape == (50, len(steps) + 1, 41)
    assert (data.goal[~data.mask] == -1).all() and not data.actions[~data.mask].any()
    assert not data.obs[:, 1:][~data.mask].any() and data.obs[:, 1:][data.mask].any(axis=1).all()
    short = np.argsort(data.lengths())[:3]
    part = data.take(short)
    assert part.mask.all(axis=1).any() and np.array_equal(part.obs, data.obs[short, : part.mask.shape[1] + 1])


def test_recorded_torques_are_clean(monkeypatch):
    """What is recorded is what `trot` says, bit by bit; what is executed has noise of the asked for deviation added,
    drawn anew each step."""
    clean, executed, trot, simulate = [], [], envs.trot, envs.ant_simulate
    monkeypatch.setattr(envs, "trot", lambda *a: clean.append(trot(*a)) or clean[-1].copy())
    monkeypatch.setattr(envs, "ant_simulate", lambda *a: executed.append(a[1].copy()) or simulate(*a))
    rng = np.random.default_rng(0)
    data = envs._ant_expert_chunk(replace(ANT, limit=30), ANT.pretrain, 40, rng, 0.1, 0, 0, 30, False, 1)[0]
    for t, torques in enumerate(clean):
        assert np.array_equal(data.actions[data.mask[:, t], t], torques.astype(np.float32))
    noise = [b - a for a, b in zip(clean, executed)]
    assert len(noise) == 30 and np.concatenate(noise).std() == pytest.approx(0.1, rel=0.05)
    together = data.mask.all(axis=1)  # the episodes still alive at the end
    rows = np.array([n[together[data.mask[:, t]]] for t, n in enumerate(noise)])
    assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("how", ["displace", "on_colour"])
def test_displaced_ants(how):
    """Jumps go to a cell that is no wall and not the goal and are no visit; with on_colour most episodes start on a
    colour that is not the first goal. The body goes on as it was, and the task is solved in order all the same."""
    data = envs.ant_expert_episodes(
        ANT, ANT.pretrain, 40, np.random.default_rng(0), 0.05, **{how: 0.03 if how == "displace" else 0.9}
    )[0]
    started, jumps = 0, 0
    for i, steps in enumerate(data.lengths()):
        x, y = data.xy(ANT)[i, : steps + 1].T
        cells = (np.clip((2.5 - y) // 1.25, 0, 3) * 4 + np.clip((x + 2.5) // 1.25, 0, 3)).astype(int)
        pursued = data.goal[i, :steps]
        assert pursued[np.flatnonzero(np.diff(pursued, prepend=-2))].tolist() == list(ANT.pretrain[data.task[i]])
        assert cells[0] != data.colours[i, pursued[0]] and data.walls[i, 0] not in cells
        started += cells[0] in data.colours[i]
        jumped = np.flatnonzero(np.hypot(np.diff(x), np.diff(y)) > 0.4) + 1
        jumped = jumped[jumped < steps]
        assert (cells[jumped] != data.colours[i, pursued[jumped]]).all()
        assert np.abs(np.diff(data.obs[i, :steps, :13], axis=0)).max() < 0.5  # the pose goes on smoothly
        jumps += len(jumped)
    assert (jumps > 40) == (how == "displace") and (started > 20) == (how == "on_colour")


def test_rotated_ant_walks_the_rotated_way():
    """Physics does not care where north is: rotating the body before a step or after it is the same."""
    batch, angle = random_ants(40), np.random.default_rng(1).uniform(-np.pi, np.pi, 40)
    torques = np.random.default_rng(2).uniform(-1, 1, (40, 8))
    batch.state = envs.ant_simulate(batch.state, torques)
    after, rotated = (
        envs.ant_simulate(state, torques) for state in (batch.state, envs.rotate_ant(batch.state, angle))
    )
    assert np.allclose(envs.rotate_ant(after, angle)[:, 3:], rotated[:, 3:], atol=1e-8)
    moved, turned = (
        state[:, 1] + 1j * state[:, 2] - batch.state[:, 1] - 1j * batch.state[:, 2] for state in (after, rotated)
    )
    assert np.allclose(moved * np.exp(1j * angle), turned, atol=1e-8) and np.abs(moved).max() > 1e-3


@functools.cache
def strides():
    return envs.ant_strides(3000, np.random.default_rng(0), 0.05)


def test_strides_walk_along_x():
    """The moments of walking are upright and, but for those that have just turned, move along x."""
    state = strides()
    assert state.shape == (3000, 30) and (state[:, 5:7] ** 2).sum(axis=1).max() < 0.5
    assert np.median(state[:, 16]) > 0.5 and abs(np.median(state[:, 17])) < 0.1
    assert np.ptp(envs.yaw_of(state)) > 6  # whatever the ant faces


@pytest.mark.parametrize("displace", [0.0, 0.8])
def test_spliced_ants(displace):
    """Spliced episodes pursue their task in order, never touch a wall or a wrong colour except by a jump, and
    no step but a jump is longer than to the next cell; how the body moves tells nothing of where the ant went."""
    rng = np.random.default_rng(1)
    data = envs.ant_spliced_episodes(ANT, ANT.pretrain, 60, 70, strides(), rng, displace, 0.5)
    assert data.obs.shape[1] == 71 and data.actions.shape == (60, 70, 8)
    assert np.array_equal(data.goal >= 0, data.mask)
    solved, jumps, forward = 0, 0, []
    for i, steps in enumerate(data.lengths()):
        x, y = data.xy(ANT)[i, : steps + 1].T
        cells = (np.clip((2.5 - y) // 1.25, 0, 3) * 4 + np.clip((x + 2.5) // 1.25, 0, 3)).astype(int)
        pursued, task = data.goal[i, :steps], list(ANT.pretrain[data.task[i]])
        stages = pursued[np.flatnonzero(np.diff(pursued, prepend=-2))].tolist()
        assert stages == task[: len(stages)] and data.walls[i, 0] not in cells
        solved += steps < 70
        assert steps == 70 or (stages == task and cells[-1] == data.colours[i, task[-1]])
        far = np.hypot(np.diff(x), np.diff(y)) > 1.35
        jumps += far.sum()
        velocity = envs.symexp(data.obs[i, 1 : steps + 1, 13:15])
        along = (velocity * np.stack([np.diff(x), np.diff(y)], axis=1)).sum(axis=1)
        forward.append(along[~far])
    assert 0.4 < (np.concatenate(forward) > 0).mean() < 0.6
    assert solved > 40 and (jumps > 300) == (displace > 0)


def test_spliced_torques_are_the_experts(monkeypatch):
    """What is recorded is the trot of the very state that is observed, towards the centre of the next cell."""
    trot, calls = envs.trot, []
    monkeypatch.setattr(envs, "trot", lambda *a: calls.append((a[0].copy(), a[1].copy(), trot(*a))) or calls[-1][2])
    data = envs.ant_spliced_episodes(ANT, ANT.pretrain, 30, 5, strides(), np.random.default_rng(0), 0.5, 0.0)
    for t, (state, way, torques) in enumerate(calls):
        alive = data.mask[:, t]
        assert np.array_equal(data.actions[alive, t], torques.astype(np.float32))
        assert np.allclose(envs.symexp(data.obs[alive, t, :27]), state[:, 3:], atol=1e-4)
        local = data.obs[alive, t][:, envs.ant_slices(ANT)["local"]] * envs.ANT_CELL / 2
        steps = envs.ANT_CELL * np.array([[0, 1], [0, -1], [-1, 0], [1, 0]]) - local[:, None]
        angles = np.arctan2(steps[..., 1], steps[..., 0])
        assert (np.abs(np.angle(np.exp(1j * (angles - way[:, None])))).min(axis=1) < 1e-3).mean() > 0.99


def test_short_steps():
    """The asked share of episodes creeps, each at its own pace between a twentieth and half of a stride."""
    rng = np.random.default_rng(2)
    data = envs.ant_spliced_episodes(ANT, ANT.pretrain, 200, 6, strides(), rng, short=0.4)
    step = np.hypot(*np.diff(data.xy(ANT), axis=1).transpose(2, 0, 1))
    creeps = np.array([row[live].max() < 0.75 * envs.STRIDE_LENGTH for row, live in zip(step, data.mask)])
    assert 0.3 < creeps.mean() < 0.6
    pace = np.sort(np.array([np.median(row[live]) for row, live in zip(step, data.mask)])[creeps] / envs.STRIDE_LENGTH)
    assert pace[0] < 0.1 and 0.3 < pace[-5] < 0.7 and pace[len(pace) // 2] < 0.3


def test_pauses():
    """The asked share of decisions hardly moves the ant."""

    def spliced(pause):
        data = envs.ant_spliced_episodes(
            ANT, ANT.pretrain, 200, 8, strides(), np.random.default_rng(2), elsewhere=0.5, pause=pause
        )
        step = np.hypot(*np.diff(data.xy(ANT), axis=1).transpose(2, 0, 1))[:, : data.mask.shape[1]][data.mask]
        return (step < 0.3 * envs.STRIDE_LENGTH).mean()

    assert spliced(0.0) < 0.05 and 0.35 < spliced(0.4) < 0.45


def test_whole_episodes_end_with_a_visit():
    """Cut episodes are the uncut ones up to their last visit; those without a visit are left as they are."""
    cut, uncut = (
        envs.ant_spliced_episodes(
            ANT, ANT.pretrain, 200, 8, strides(), np.random.default_rng(3), elsewhere=0.5, whole=whole
        ) for whole in (True, False)
    )  # fmt: skip
    column, row = np.clip((2.5 + uncut.xy(ANT) * [1, -1]) // 1.25, 0, 3).astype(int).transpose(2, 0, 1)
    kinds = set()
    for i, (steps, before) in enumerate(zip(cut.lengths(), uncut.lengths())):
        goal = uncut.goal[i, :before]
        at = [t + 1 for t in range(before) if 4 * row[i, t + 1] + column[i, t + 1] == uncut.colours[i, goal[t]]]
        assert steps == (at[-1] if at else before)
        kinds.add((bool(at), steps < before))
        for part, kept in (("obs", steps + 1), ("actions", steps), ("goal", steps), ("asked", steps)):
            one, other = getattr(cut, part)[i], getattr(uncut, part)[i]
            assert np.array_equal(one[:kept], other[:kept]) and (one[kept:] == (-1 if part == "goal" else 0)).all()
    assert kinds == {(True, True), (True, False), (False, False)}


def test_asked_elsewhere(monkeypatch):
    """Elsewhere the expert goes for the same colour, in a cell that is no wall; the trajectory does not notice."""

    def spliced(elsewhere):
        return envs.ant_spliced_episodes(
            ANT, ANT.pretrain, 40, 20, strides(), np.random.default_rng(3), 0, 0, elsewhere
        )

    plain = spliced(0.0)
    assert np.array_equal(plain.asked, plain.obs[:, :-1])
    trot, calls = envs.trot, []
    monkeypatch.setattr(envs, "trot", lambda *a: calls.append(trot(*a)) or calls[-1])
    data = spliced(0.7)
    things, goals = envs.ant_slices(ANT)["things"], data.goal[data.mask]
    moved = (data.asked != data.obs[:, :-1]).any(axis=-1)[data.mask]
    assert 0.5 < moved.mean() < 0.75 and data.goal.max() > 0
    assert np.array_equal(data.actions[:, 0], calls[0].astype(np.float32))  # asked where the ant now stands
    offset = data.asked[data.mask][moved][:, things].reshape(-1, ANT.colours + ANT.walls, 2) * ANT.size / 2
    inside = np.abs(offset).max(axis=-1) < 0.5  # of one cell
    assert not inside[:, ANT.colours :].any()
    assert not inside[np.arange(len(inside)), goals[moved]].any() and inside.any()
    far = np.hypot(*np.diff(data.xy(ANT), axis=1).transpose(2, 0, 1))[data.mask]
    assert far.max() < 1.35


def test_turned_ant_is_the_same_task():
    """A turned world with renamed legs is an exact symmetry: the turned observation is that of the turned state, and
    the turned torques lead from there to the turned next state."""
    batch, torques = random_ants(40), np.random.default_rng(1).uniform(-1, 1, (40, 8))
    for _ in range(10):
        batch.step(torques)
    turns, legs = np.arange(40) % 4, np.arange(40) // 4 % 4
    other = random_ants(40)
    other._things, other.cell = batch._things.copy(), batch.cell.copy()
    for _ in range(3):
        more = turns > _
        for cells in (other._things, other.cell):
            row, column = np.divmod(cells[more], 4)
            cells[more] = (3 - column) * 4 + row

    def turn(state):
        turned, sign = state.copy(), np.stack([np.ones(4), envs.ANKLE_SIGN], axis=1)
        for i, angle in ((1, turns), (16, turns), (19, -legs)):  # place, velocity; turning rates are the body's
            vector = (state[:, i] + 1j * state[:, i + 1]) * 1j ** (angle % 4)
            turned[:, i], turned[:, i + 1] = vector.real, vector.imag
        w, x, y, z = state[:, envs.QUATERNION].T
        one, two = (
            (w + 1j * z) * np.exp(0.25j * np.pi * (turns + legs)),
            (x + 1j * y) * np.exp(0.25j * np.pi * (turns - legs)),
        )
        turned[:, envs.QUATERNION] = np.stack([one.real, two.real, two.imag, one.imag], axis=1)
        for part in (envs.JOINTS, envs.JOINT_RATES):
            for i in range(40):
                turned[i, part] = (np.roll(state[i, part].reshape(4, 2) * sign, -legs[i], axis=0) * sign).reshape(-1)
        return turned

    other.state = turn(batch.state)
    seen = envs.turn_ant(ANT, batch.observe()[:, None], turns, legs)[:, 0]
    assert np.allclose(seen, other.observe(), atol=1e-5)
    after = envs.ant_simulate(other.state, envs.turn_torques(torques[:, None], legs)[:, 0])
    assert np.allclose(after, turn(envs.ant_simulate(batch.state, torques)), atol=1e-8)


# ---- The Gymnasium environment ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "ansi", "rgb_array"])
def test_check_ant_env_has_no_complaint(mode):
    """Gymnasium's own checker passes with every warning turned into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ANT_ID, render_mode=mode).unwrapped)


def test_default_ant_is_the_papers_and_seeded():
    """gym.make without arguments is the 4x4 post-training task 0-1-2-3 with 500 steps; a seed decides everything."""
    env = gymnasium.make(ANT_ID)
    world = env.unwrapped.world
    assert (world.post, world.limit, world.size, world.colours, world.walls) == ((0, 1, 2, 3), 500, 4, 4, 1)
    torques = np.random.default_rng(0).uniform(-1, 1, (4, 8)).astype(np.float32)
    episodes = [[env.reset(seed=seed)[0], *(env.step(a)[0] for a in torques), env.reset()[0]] for seed in (3, 3, 4)]
    first, same, other = np.array(episodes)
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_ant_env_is_the_view_of_a_batch_of_one():
    """Observations, rewards and ends are those of AntBatch; led by the expert it solves the task and says so."""
    env = gymnasium.make(ANT_ID)
    rng, rewards = np.random.default_rng(0), []
    for seed in range(2):
        env.reset(seed=seed, options={"solvable": True})
        inner = env.unwrapped._batch
        layout = envs.Layout(inner.colours, inner.walls, inner.cell)
        batch = envs.AntBatch(ANT, layout, [ANT.post], rng)
        batch.state = inner.state.copy()
        route = envs.ant_routes(envs.distance_fields(ANT, layout), rng)
        over = False
        while not over:
            torques = envs.ant_expert(batch, route, np.arange(1))
            obs, reward, over, truncated, info = env.step(torques[0])
            _, expected, done = batch.step(torques)
            assert (reward, over, info["subgoal"]) == (expected[0], done[0], batch.subgoal()[0])
            assert np.array_equal(obs, batch.observe()[0]) and truncated is False
            assert env.observation_space.contains(obs)
        rewards.append(reward)
    assert 1.0 in rewards and type(reward) is float and type(over) is bool


@pytest.mark.parametrize("arguments, named", [
    ({"size": 2}, "size"), ({"colours": 0}, "colours"), ({"walls": -1}, "walls"), ({"limit": 0}, "limit"),
    ({"task": (0, 4)}, "task"), ({"task": (1, 1)}, "task"), ({"render_mode": "human"}, "render_mode"),
])  # fmt: skip
def test_impossible_ant_worlds_are_refused(arguments, named):
    """An argument that makes no grid or no task is a ValueError that names it."""
    with pytest.raises(ValueError, match=named):
        envs.AntPinpad(**arguments)


def test_ant_env_refuses_misuse():
    """A wrong number of torques is a ValueError; stepping or rendering before reset is Gymnasium's ResetNeeded."""
    env = envs.AntPinpad()
    for call in (lambda: env.step(np.zeros(8)), env.render):
        with pytest.raises(gymnasium.error.ResetNeeded):
            call()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="8 torques"):
        env.step(np.zeros(7))


def test_ant_rendering():
    """rgb_array has 48 pixels a cell, the torso is a black disc where xy says, y up; ansi is the grid's."""
    env = gymnasium.make(ANT_ID, render_mode="rgb_array")
    env.reset(seed=0)
    batch = env.unwrapped._batch
    batch.state[:, envs.XY], batch.cell[:] = (0.625, 1.875), 2  # the third cell of the top row
    picture = env.render()
    assert picture.shape == (192, 192, 3) and picture.dtype == np.uint8
    black = (picture == 0).all(axis=-1)
    assert black[24 - 9 : 24 + 9, 120].all() and black[24, 120 - 9 : 120 + 9].all() and not black[96:].any()
    feet = np.argwhere(black) - (24, 120)
    assert 30 < np.hypot(*feet.T).max() < 40 and black.mean() < 0.05
    assert envs.grid_text(batch.world, batch.content[0], 2)[4] in "@*"


# ---- Base model ------------------------------------------------------------------------------------


def make_run(**changes) -> ir.Run:
    sizes = {"layers": 3, "dim": 16, "heads": 2, "mlp": 24, "rank": 3, "code_dim": 4, "policy_dim": 16}
    config = replace(ir.Config(), eval_episodes=16, **(sizes | changes))
    return ir.Run(config, 0, torch.device("cpu"), quiet=True)


def wake(module, std=0.3):
    """Add noise to all parameters, so that no path is shut by its initial zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape))
    return module


def observations():
    """Cells (B, T, O + W + 1) of a few episodes."""
    return torch.from_numpy(expert(4).inputs()[:, :9])


def cut_and_padded():
    """The same 12 expert episodes with as little padding as possible, and with that of a longer episode."""
    episodes = expert(40)
    short = np.argsort(episodes.mask.sum(axis=1))[:12]
    return episodes.take(short), envs.Episodes(*(column[short] for column in episodes))


def without_gradient(module) -> set:
    return {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}


def test_linear_recurrence_gradient():
    """The hand-written backward of h_t = a_t h_t-1 + b_t is the derivative of its forward, which is that formula."""
    a, b, h = (torch.rand(shape, dtype=torch.double, requires_grad=True) for shape in [(2, 5, 3), (2, 5, 3), (2, 3)])
    assert torch.autograd.gradcheck(ir.LinearRecurrence.apply, (a, b, h))
    assert torch.allclose(ir.LinearRecurrence.apply(a, b, h)[:, 1], a[:, 1] * (a[:, 0] * h + b[:, 0]) + b[:, 1])


@BLOCKS
@pytest.mark.parametrize("kind", ["0 or 1", "fractional"])
def test_block_parallel_equals_step_form(block, kind):
    """A block run on 9 steps at once equals the block fed 1, 1, 3, 1, 2, 1 steps with its state carried along. A
    step with keep = 0 is a fresh start, one with keep = 1 remembers, one with keep = -1 does not remember either, but
    in Hawk is no start."""
    module = wake(ir.Block(make_run(block=block).config)).double()
    x, keep, state = torch.randn(3, 9, 16).double(), torch.rand(3, 9).double(), module.mixer.initial(3)
    keep = keep.round() if kind == "0 or 1" else keep
    expected, outputs = module(x, keep, state)[0], []
    for part in torch.arange(9).split([1, 1, 3, 1, 2, 1]):
        y, state = module(x[:, part], keep[:, part], state)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, dim=1), expected, atol=1e-9)
    fresh = module(x[:, 4:], keep[:, 4:], module.mixer.initial(3))[0]
    past = torch.cat([-x[:, :4], x[:, 4:]], dim=1)
    for value in (0, 1, -1):
        keep[:, 4] = value
        after, other = (module(seen, keep, module.mixer.initial(3))[0][:, 4:] for seen in (x, past))
        assert torch.allclose(after, fresh, atol=1e-3) == (value == 0 or (value, block) == (-1, "transformer"))
        assert torch.allclose(after, other, atol=1e-3) == (value < 1)


@BLOCKS
@pytest.mark.parametrize("relative", [True, False])
def test_base_is_causal_and_steps(block, relative):
    """Changing the observations from step 5 on changes logits there and none before; step by step, with different
    memories of the lower and the upper part, the logits are those of the whole sequence."""
    base = wake(ir.BaseModel(make_run(block=block, relative_obs=relative).config), 0.1).double()
    cells, keep, keep_lower = observations(), *torch.rand(2, 4, 9).round().double()
    logits, changed = base(cells, keep, keep_lower), cells.clone()
    changed[:, 5:, -1] = (changed[:, 5:, -1] + 7) % 25
    difference = (base(changed, keep, keep_lower) - logits).abs().amax(dim=(0, 2))
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()
    state, outputs = base.initial(4), []
    for t in range(9):
        residual, state = base.lower(cells[:, t : t + 1], keep_lower[:, t : t + 1], state)
        y, state = base.upper(residual, keep[:, t : t + 1], state)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, dim=1), logits, atol=1e-9)


def test_absolute_embedding_is_linear():
    """Absolute: the embedding is the env's observation of 637 numbers times one weight matrix."""
    embed = ir.GridEmbedding(make_run(world="paper", relative_obs=False).config, 96)
    batch = envs.GridBatch(PAPER, envs.sample_layouts(PAPER, 6, np.random.default_rng(0)), [PAPER.post] * 6)
    weight = embed.weight.unflatten(0, (13, 49)).transpose(0, 1).flatten(0, 1)  # (object, cell) -> (cell, object)
    found, expected = embed(torch.from_numpy(batch.inputs())), torch.from_numpy(batch.observe()) @ weight
    assert torch.allclose(found, expected, atol=1e-5)


def test_relative_embedding_sees_offsets():
    """Relative: shifting everything by one row changes only the agent's own term, and exchanging two walls nothing;
    exchanging two colours, or moving one, changes the embedding."""
    embed = wake(ir.GridEmbedding(make_run(world="paper").config, 96))
    cells = torch.tensor([[[0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32, 33]]])  # 8 colours, 4 walls, agent
    walls, colours, moved = cells.clone(), cells.clone(), cells.clone()
    walls[..., [8, 9]], colours[..., [0, 1]], moved[..., 0] = cells[..., [9, 8]], cells[..., [1, 0]], 3
    assert torch.allclose(embed(cells + 7) - embed.agent[40], embed(cells) - embed.agent[33], atol=1e-5)
    assert torch.allclose(embed(walls), embed(cells), atol=1e-5)
    assert not any(torch.allclose(embed(other), embed(cells), atol=1e-2) for other in (colours, moved))


def test_ant_embedding_knows_the_cells():
    """The cells that the ant's embedding reads off an observation are those of the batch, on and off the grid; and
    what it sees of the body does not change when the whole world is turned."""
    embed = ir.AntEmbedding(make_run(world="ant").config)
    batch = random_ants(200)
    batch.state[:20, 1] += 4
    batch.cell = batch._cell_of(batch.state[:, envs.XY])
    embed.body.weight.data[:, -8:] = 0  # the directions of the cells above, below, left and right change places
    cells, bodies = [], []
    embed.cells.register_forward_pre_hook(lambda module, arguments: cells.append(arguments[0].numpy()))
    embed.body.register_forward_hook(lambda module, arguments, output: bodies.append(output))
    turned = envs.turn_ant(ANT, batch.observe()[:, None], np.full(200, 2), np.zeros(200, dtype=int))[:, 0]
    for obs in (batch.observe(), turned):
        embed(torch.from_numpy(obs))
    assert np.array_equal(cells[0], np.concatenate([batch._things, batch.cell[:, None]], axis=1))
    assert torch.allclose(*bodies, atol=1e-4) and bodies[0].std() > 0.1


def test_gaussian_head_is_torch_s():
    """The ant's head has the density of torch's Normal, and draws from it with its deviation times the temperature."""
    run = make_run(world="ant")
    head, mean = wake(ir.Gaussian(run.config)), torch.randn(5, 8)
    normal, action = torch.distributions.Normal(mean, 0.5 * head.log_std.exp()), torch.randn(5, 8)
    assert torch.allclose(head.log_prob(mean, action, 0.5), normal.log_prob(action).sum(-1), atol=1e-4)
    drawn = head.sample(mean[:1].expand(20_000, 8), 0.5, generators()[1])
    assert torch.allclose(drawn.mean(0), mean[0], atol=0.03) and torch.allclose(drawn.std(0), normal.stddev, rtol=0.05)


@BLOCKS
@pytest.mark.parametrize("obs_loss", [0.0, 0.1])
def test_pretraining_loss(block, obs_loss):
    """Every parameter of the base gets a gradient (next_head only with obs_loss); more padding changes nothing."""
    run = make_run(block=block, obs_loss=obs_loss, relative_obs=block == "hawk")
    base, losses = ir.BaseModel(run.config), []
    for episodes in cut_and_padded():
        keep = torch.ones(episodes.mask.shape)
        losses.append(ir.pretrain_loss(run, base, episodes, keep, keep)[0])
    losses[0].backward()
    assert {name.split(".")[0] for name in without_gradient(base)} == (set() if obs_loss else {"next_head"})
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)


# ---- Metacontroller --------------------------------------------------------------------------------


def make_meta(run):
    """Random weights, with a gate that is open about half of the time."""
    meta = wake(ir.Metacontroller(run.config, torch.randn(run.config.dim)))
    torch.nn.init.normal_(meta.switch[2].weight)
    torch.nn.init.zeros_(meta.switch[2].bias)
    return meta


def test_controller_is_e_plus_U_e():
    """apply_controller equals e + U (e - mean) with U = out^T inn, and never makes a D x D matrix to get there."""
    residual, mean = torch.randn(2, 3, 64, requires_grad=True), torch.randn(64)
    out, inn = torch.randn(2, 2, 3, 2, 64, requires_grad=True)
    U, sizes = out.transpose(-1, -2) @ inn, []  # (2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        found = ir.apply_controller(residual, (out, inn), mean)
    assert torch.allclose(found, residual + (U @ (residual - mean)[..., None])[..., 0], atol=1e-4)
    assert 0 < max(sizes) < 64 * 64


def test_controller_at_start_controls_nothing():
    """A new metacontroller, and new labelled controllers, leave the base's logits exactly as they are."""
    c, mean, cells, keep = make_run().config, torch.randn(16), observations(), torch.ones(4, 9)
    base, meta, labels = ir.BaseModel(c), ir.Metacontroller(c, mean), ir.Labels(c, mean, 4)
    for controller in (meta.controller(torch.randn(4, 9, 4)), labels.controller(torch.zeros(4, 9).long())):
        residual = ir.apply_controller(base.lower(cells, keep)[0], controller, mean)
        assert torch.equal(base.upper(residual, keep)[0], base(cells, keep))


@pytest.mark.parametrize("gates, hold, opened, codes", [  # gates: what the switching unit says after step 1
    ([0, 0, 1], None, [1, 0, 0, 1], [10, 10, 10, 40]),
    ([1, 1, 1], None, [1, 1, 1, 1], [10, 20, 30, 40]),
    ([0.5, 0, 0.25], None, [1, 0.5, 0, 0.25], [10, 15, 15, 0.75 * 15 + 0.25 * 40]),
    ([1, 1, 1], 1, [1, 0, 1, 0], [10, 10, 30, 30]),
    ([1, 1, 1], 2, [1, 0, 0, 1], [10, 10, 10, 40]),
])  # fmt: skip
def test_temporal_integration_algebra(gates, hold, opened, codes):
    """z_t = beta_t z~_t + (1 - beta_t) z_t-1: gates [1,0,0,1] on proposals [10,20,30,40] give [10,10,10,40]; gates of
    1 give the proposals; the first step always adopts; `hold` n shuts the gate for n steps."""
    meta, script = make_meta(make_run(code_dim=1)), iter(gates)
    meta.gate = lambda residual, history, code: torch.full((1,), float(next(script)))
    proposal, hold = torch.tensor([[[10.0], [20], [30], [40]]]), None if hold is None else torch.tensor([hold])
    code, gate = meta.integrate(torch.randn(1, 4, 16), proposal, hold)
    assert (gate.flatten().tolist(), code.flatten().tolist()) == (opened, codes)


def test_memory_after_a_switch():
    """segment: nothing is carried from before into a switching step; none clears always, full never."""
    gate = torch.tensor([[1.0, 0, 0, 1, 0], [1, 1, 0, 0.25, 0]])
    assert ir.memory_after(gate, "segment").tolist() == [[0, 1, 1, 0, 1], [0, 0, 1, 0.75, 1]]
    assert (ir.memory_after(gate, "none") == -1).all() and (ir.memory_after(gate, "full") == 1).all()


@SUMMARIES
def test_gate_is_causal_and_encoder_is_not(summary):
    """Changing the residual from step 5 on changes no history, gate or code before it, but every proposal."""
    meta = make_meta(make_run(summary=summary))
    residual, proposal = torch.randn(3, 9, 16), torch.randn(3, 8, 4)
    changed = torch.cat([residual[:, :5], torch.randn(3, 4, 16)], dim=1)
    for before, after in (
        (meta.history(residual)[0][:, :8], meta.history(changed)[0][:, :8]),
        *zip(meta.integrate(residual[:, :8], proposal), meta.integrate(changed[:, :8], proposal)),
    ):
        assert torch.equal(before[:, :5], after[:, :5]) and not torch.isclose(before[:, 5:], after[:, 5:]).all()
    length = torch.full((3,), 8)
    for before, after in zip(meta.encode(residual, length), meta.encode(changed, length)):
        assert before.shape == (3, 8, 4) and (before != after).any(dim=-1).all()


def test_pilot_step_by_step_equals_the_whole_sequence():
    """CodePilot, one step at a time, has the codes, gates and control of `integrate(hard=True)`."""
    run = make_run()
    meta, residual, proposal = make_meta(run).requires_grad_(False), torch.randn(6, 12, 16), torch.randn(6, 12, 4)
    code, gate = meta.integrate(residual, proposal, hard=True)
    expected = ir.apply_controller(residual, meta.controller(code), meta.mean)
    choose = Mock(side_effect=lambda inputs, opened, alive: proposal[opened, t])
    pilot = ir.CodePilot(meta, choose)
    pilot.begin(6, run)
    for t in range(12):
        controlled, opened = pilot.steer(residual[:, t], None, np.arange(6))
        assert torch.equal(opened, gate[:, t]) and torch.allclose(pilot.code, code[:, t])
        assert torch.allclose(controlled, expected[:, t], atol=1e-4)
    assert 0.1 < gate[:, 1:].mean() < 0.9


def test_gaussians_equal_torch_distributions():
    """code_kl and gaussian_log_prob are those of torch.distributions."""
    mean, log_std, x = torch.randn(3, 5, 8)
    normal, prior = Normal(mean, log_std.exp()), Normal(0.0, 1.0)
    assert torch.allclose(ir.code_kl(mean, log_std), kl_divergence(normal, prior).sum(-1), atol=1e-5)
    assert torch.allclose(ir.gaussian_log_prob(x, mean, log_std), normal.log_prob(x).sum(-1), atol=1e-4)


@pytest.mark.parametrize("stage, changes", [
    ("blind", {}), ("held", {"hold": 2}), ("free", {}),
    ("free", {"memory": "full", "summary": "whole", "mirror": False, "block": "transformer", "soft_targets": False}),
], ids=["blind", "held", "free", "paper"])  # fmt: skip
def test_discovery_trains_all_of_the_metacontroller_and_nothing_else(stage, changes):
    """The action loss alone (no KL) gives every metacontroller parameter a gradient through the frozen base, which
    gets none and is the same to the last bit after an update."""
    run, generator = make_run(**changes), generators()[1]
    base, meta = ir.BaseModel(run.config).requires_grad_(False), ir.Metacontroller(run.config, torch.zeros(16))
    wake(meta.decoder)  # its first half starts at zero, and without control no gradient gets past it
    base_before, meta_before = ({k: v.clone() for k, v in model.state_dict().items()} for model in (base, meta))
    ir.discovery_loss(run, base, meta, expert(12), generator, 0.0, stage)[0].backward()
    assert without_gradient(meta) == set() and all(p.grad is None for p in base.parameters())
    loss, _ = ir.discovery_loss(run, base, meta, expert(12), generator, 0.1, stage)
    ir.update(meta, loss, *([x] for x in ir.adamw(meta, 1e-2, 10)))
    assert all(torch.equal(base_before[k], v) for k, v in base.state_dict().items())
    assert {k for k, v in meta.state_dict().items() if torch.equal(meta_before[k], v)} == {"mean"}


@pytest.mark.parametrize("stage, learns", [("blind", False), ("held", False), ("free", True)])
def test_gate_learns_from_memory_only_when_free(stage, learns):
    """Where the code does nothing (no control yet), a gradient can reach the gate through the base's memory alone."""
    run = make_run()
    base, meta = wake(ir.BaseModel(run.config)).requires_grad_(False), ir.Metacontroller(run.config, torch.zeros(16))
    ir.discovery_loss(run, base, meta, expert(12), generators()[1], 0.0, stage)[0].backward()
    gradient = meta.switch[2].bias.grad
    assert (gradient is not None and gradient.abs().item() > 1e-6) == learns


def ant_meta(**changes):
    """A run of the ant, a base and a metacontroller with random weights, and 24 spliced episodes."""
    run = make_run(world="ant", memory="none", control_block=0, **changes)
    torch.manual_seed(0)
    base = wake(ir.BaseModel(run.config)).requires_grad_(False)
    rng = np.random.default_rng(5)
    episodes = envs.ant_spliced_episodes(ANT, ANT.pretrain, 24, 16, strides(), rng, elsewhere=0.7)
    return run, base, make_meta(run), episodes


def test_elsewhere_only_the_base_acts():
    """Where the expert was asked decides the loss of the actions, but not codes and gates: they see the trajectory."""
    run, base, meta, episodes = ant_meta(elsewhere=0.7)
    here, there = (
        ir.discovery_loss(run, base, meta, e, generators()[1], 0.1, "free")[1]
        for e in (episodes._replace(asked=episodes.obs[:, :-1]), episodes)
    )
    assert here["kl"] == there["kl"] and here["gates"] == there["gates"] and here["nll"] != there["nll"]


@pytest.mark.parametrize("at_switches, price", [(False, 1.0), (True, 0.25 * 1.375)])
def test_price_of_a_code(at_switches, price):
    """The KL of a proposal is charged whole at every step, or where the gate opens, g < 1 costing more than a share
    g of it; the first step, which always adopts, costs all of it."""
    run, base, meta, episodes = ant_meta(kl_at_switches=at_switches)
    with torch.no_grad():  # a gate that is always a quarter open
        meta.switch[2].weight.zero_()
        meta.switch[2].bias.fill_(math.log(1 / 3))
    generator = generators()[1]
    kl = ir.code_kl(*ir.posterior(run, base, meta, episodes, generator)) * torch.from_numpy(episodes.mask)
    expected = (kl[:, 0] + price * kl[:, 1:].sum(1)).mean().item()
    stats = ir.discovery_loss(run, base, meta, episodes, generators()[1], 0.1, "free")[1]
    assert stats["kl"] == pytest.approx(expected, rel=1e-4)


def test_only_discovery_pauses_and_cuts():
    """Phase 2 learns from ants that pause and arrive; phase 1 and the check with ground-truth controllers do not."""
    run = make_run(world="ant", memory="none", ant_pause=1.0, elsewhere=0.5, ant_steps=8, ant_whole=12)
    for phase, pauses in (("pretrain", False), ("steer", False), ("discover", True)):
        rng, _ = run.start(phase)
        data = ir.spliced_episodes(run, 50, rng)
        step = np.hypot(*np.diff(data.xy(ANT), axis=1).transpose(2, 0, 1))[:, : data.mask.shape[1]][data.mask]
        assert (np.median(step) < 0.2 * envs.STRIDE_LENGTH) == pauses
        assert (data.mask.shape[1] == 12) == pauses


def test_brief_posterior_ignores_the_pace():
    """Read briefly, an episode in which every step is drawn out to seven has the proposals of one that is not."""
    run, base, meta, data = ant_meta()
    cells = base.embed.places(torch.from_numpy(data.obs))[..., -1, :].floor()
    for i in range(24):  # keep the steps that lead into another cell
        n = data.lengths()[i]
        kept = [0] + [t for t in range(1, n) if (cells[i, t] != cells[i, t - 1]).any()]
        obs = np.concatenate([data.obs[i, kept], data.obs[i, n : n + 1]])[None]
        mask = np.ones((1, len(kept)), dtype=bool)
        brisk = data._replace(obs=obs, mask=mask, actions=data.actions[i : i + 1, kept])
        drawn_out = brisk._replace(
            obs=np.concatenate([np.repeat(obs[:, :-1], 7, axis=1), obs[:, -1:]], axis=1),
            mask=np.repeat(mask, 7, axis=1),
        )
        plain = ir.posterior(run, base, meta, brisk, generators()[1])
        brief = ir.posterior(run, base, meta, drawn_out, generators()[1], brief=True)
        for a, b in zip(plain, brief):
            assert torch.allclose(a.repeat_interleave(7, dim=1), b, atol=1e-5)


@SUMMARIES
def test_padding_changes_no_discovery_loss(summary):
    """More padding changes neither NLL nor KL nor gates: the embedder reads backwards, but not from the padding."""
    run = make_run(summary=summary)
    base, meta, stats = ir.BaseModel(run.config), make_meta(run), []
    meta.encoder[2].bias.data[4:] -= 30  # codes without sampling noise, whose draws depend on the shape
    for episodes in cut_and_padded():
        stats.append(ir.discovery_loss(run, base, meta, episodes, generators()[1], 0.1, "held")[1])
    assert stats[0] == pytest.approx(stats[1], rel=1e-5)


def test_mirrored_view_is_a_symmetric_copy():
    """Each episode gets one symmetry of the square for all its steps and objects; all 8 occur."""
    episodes, table = expert(64), envs.mirror_table(5)
    view = ir.mirrored(make_run(), episodes, generators()[1]).numpy()
    matches = np.stack([(symmetry[episodes.inputs()] == view).all(axis=(1, 2)) for symmetry in table])  # (8, N)
    assert (matches.sum(axis=0) == 1).all() and matches.any(axis=1).all()


def test_paper_preset_has_the_papers_sizes():
    """`--preset paper` has the sizes of PAPER.md, builds models of the parameter counts worked out here by hand, and
    can take a step of pretraining and a step of discovery."""
    c, episodes = ir.PAPER, expert(2, PAPER)
    sizes = {
        "world": "paper", "block": "transformer", "layers": 6, "dim": 256, "heads": 4, "mlp": 512, "control_block": 3,
        "history_dim": 32, "summary_dim": 32, "encoder_hidden": 64, "code_dim": 8, "decoder_hidden": 32, "rank": 16,
        "pretrain_steps": 256_000, "pretrain_batch": 1024, "pretrain_lr": 3e-4, "init_scale": 0.1, "rl_lr": 3e-5,
        "discover_steps": 64_000, "discover_batch": 512, "discover_lr": 1e-3, "rl_batch": 1024, "weight_decay": 0.03,
        "rl_episodes": 102_400_000, "rl_threshold": 0.5, "policy_dim": 256, "memory": "full", "summary": "whole",
    }  # fmt: skip
    assert {name: getattr(c, name) for name in sizes} == sizes
    ir.check_config(c)
    run = ir.Run(c, 0, torch.device("cpu"), quiet=True)
    base, meta = ir.BaseModel(c), ir.Metacontroller(c, torch.zeros(256))
    block = 2 * 256 + 4 * 256 * 256 + 4 * 32 + 2 * 256 * 512  # norms, attention, relative bias, MLP
    assert sum(p.numel() for p in base.parameters()) == 637 * 256 + 6 * block + 256 + 257 * 4 + 257 * 49 == 3_326_517
    gru, encoder, switch = 3 * 32 * (256 + 32 + 2), 321 * 64 + 65 * 16, 297 * 64 + 65
    decoder = 9 * 32 + 33 * 2 * 16 * 256
    assert sum(p.numel() for p in meta.parameters()) == 2 * gru + encoder + switch + decoder == 366_961
    keep = torch.ones(episodes.mask.shape)
    loss, _ = ir.pretrain_loss(run, base, episodes, keep, keep)
    ir.update(base, loss, *ir.make_optimisers(c, base, c.pretrain_lr, 10))
    loss, _ = ir.discovery_loss(run, base.requires_grad_(False), meta, episodes, generators()[1], c.kl_weight, "free")
    ir.update(meta, loss, *([x] for x in ir.adamw(meta, c.discover_lr, 10)))
    assert all(p.isfinite().all() for p in (loss, *base.parameters(), *meta.parameters()))


# ---- Rollouts and what is measured on them ---------------------------------------------------------


@pytest.fixture(params=["small", "ant"])
def players(request):
    """run, frozen base and metacontroller, policy, all with random weights."""
    run = make_run(memory="segment", world=request.param)
    run.world = replace(run.world, limit=min(run.world.limit, 40 if run.world.ant else 100))
    base, meta = wake(ir.BaseModel(run.config), 0.2), make_meta(run)
    return run, base.requires_grad_(False), meta.requires_grad_(False), wake(ir.Policy(run.config), 0.1)


@pytest.mark.parametrize("memory", ["none", "segment", "full"])
def test_rollout_equals_the_whole_sequence(players, memory):
    """Rollouts, which go step by step and drop the dead, have the gates and log-probabilities that discovery's form of
    the model gives the same episodes at once: dropping changes nothing for the living, and only they are computed."""
    run, base, meta, _ = players
    run.config = replace(run.config, memory=memory)
    pilot = ir.CodePilot(meta, Mock(side_effect=lambda residual, opened, alive: residual[:, :4]))
    result = ir.rollout(run, base, pilot, 60, *generators(), record=True)
    residual, mask = ir.lower_residual(run, base, torch.from_numpy(result.inputs)), torch.from_numpy(result.mask)
    code, gate = meta.integrate(residual, residual[..., :4], hard=True)
    controlled = ir.apply_controller(residual, meta.controller(code), meta.mean)
    log_p = base.action_head.log_prob(base.upper(controlled, ir.memory_after(gate, memory))[0], result.actions)
    assert np.array_equal(gate.numpy() * result.mask, result.switched)
    assert torch.allclose(log_p * mask, result.log_prob, atol=1e-3)
    assert result.steps == result.mask.sum() and len(set(result.mask.sum(axis=1))) > 5


@pytest.mark.parametrize("most", [3, 99])
def test_code_is_held_between_switches_where_alone_it_is_chosen(players, most):
    """The code of a living episode changes exactly where its gate is open, as it is at the first step. The batch of
    internal RL has one decision a switch, in order, over several chunks of episodes, and at most `most` an episode;
    computed again on the contracted sequences, the log-probabilities are those of the rollout: the first ratio is
    1."""
    run, base, meta, policy = players
    codes = ir.PolicyCodes(policy, generators()[1], most)
    pilot = ir.CodePilot(meta, codes)
    steer, held = pilot.steer, torch.zeros(20, 4)

    def spy(residual, batch, alive):
        controlled, opened = steer(residual, batch, alive)
        assert torch.equal((held[alive] != pilot.code).any(dim=-1), opened.bool())
        held[alive] = pilot.code
        return controlled, opened

    pilot.steer = spy
    result = ir.rollout(run, base, pilot, 50, *generators(), chunk=20)
    assert result.switched[:, 0].all() and 50 < result.switched.sum() < result.steps
    batch = codes.batch(result.reward)
    assert np.array_equal(batch.mask.sum(1).numpy(), result.switched.sum(axis=1).clip(max=most))
    assert batch.mask.shape[1] <= most and batch.log_prob.std() > 0.1
    log_prob = ir.InternalLearner(run, base, meta, policy).log_prob(batch.inputs, batch.chosen)
    assert torch.allclose(log_prob * batch.mask, batch.log_prob, atol=1e-3)
    loss = ir.policy_loss(log_prob, batch.log_prob, torch.ones(50, 1), batch.mask, 0.2)
    assert loss.item() == pytest.approx(-1, abs=1e-3)


def test_a_policy_that_is_not_sampled_chooses_its_means(players):
    """Evaluated by its means, the policy's codes are exactly its means; sampled, they are not."""
    run, base, meta, policy = players
    for sample in (True, False):
        batch = ir.InternalLearner(run, base, meta, policy).collect(20, *generators(), sample)
        gap = (batch.chosen - policy(batch.inputs)[0]).abs().amax(-1)[batch.mask > 0]
        assert (gap < 1e-4).all() != sample and (gap > 0.1).any() == sample


def test_raw_log_probability_is_that_of_the_rollout(players):
    """Raw RL's log-probabilities of its own fresh rollouts, computed again on whole sequences, are those stored."""
    learner = ir.RawLearner(players[0], players[1].requires_grad_(True))
    batch = learner.collect(40, *generators())
    log_prob = learner.log_prob(batch.inputs, batch.chosen)
    assert torch.allclose(log_prob * batch.mask, batch.log_prob, atol=1e-4) and batch.log_prob.min() < -0.5


def test_transitions_and_nearness_by_hand():
    """Single colours: after 0 came 1 twice; after 1 came 3, 2. Pairs: after 0-1 came 2-3 once, and once no pair.
    Of three marks, one has another mark at most one step away in the same episode."""
    single = ir.transition_table(SMALL, np.array([[0, -1, 1, 3], [-1, 0, 1, 2]]))
    assert single.tolist() == [[0, 1, 0, 0, 0], [0, 0, 0.5, 0.5, 0], [0] * 5, [0] * 5]
    pairs = ir.transition_table(PAPER, np.array([[0, -1, 1, 2, 3, 4], [0, 1, -1, -1, 5, 4]]))
    assert pairs.tolist() == [[0, 0.5, 0, 0, 0.5], [0] * 5, [0] * 5, [0] * 5]
    marks = np.array([[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=bool)
    others = np.array([[0, 1, 0, 0, 0], [1, 0, 0, 0, 1]], dtype=bool)
    assert ir.share_near(marks, others) == pytest.approx(1 / 3) and ir.share_near(marks & ~marks, others) == 0


# ---- Reinforcement learning ------------------------------------------------------------------------


def test_objective_by_hand():
    """A = (R - mean) / std: one success in four has mean 1/4, standard deviation sqrt(3)/4; no success, all zero.
    The loss is -mean over decisions made of min(ratio A, clip(ratio) A), with the advantage of each sample."""
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (math.sqrt(3) / 4 + 1e-3)
    assert torch.allclose(ir.terminal_advantage(torch.tensor([1.0, 0, 0, 0])), expected)
    assert not ir.terminal_advantage(torch.zeros(4)).any()
    log_prob, old, advantage, made, gains = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5), [4, 2, 1, 3, 4], []
    for n in range(5):
        for k in range(made[n]):
            ratio = math.exp(log_prob[n, k] - old[n, k])
            gains.append(min(ratio * advantage[n].item(), min(max(ratio, 0.8), 1.2) * advantage[n].item()))
    mask = (torch.arange(4) < torch.tensor(made)[:, None]).float()
    loss = ir.policy_loss(log_prob, old, advantage[:, None], mask, 0.2)
    assert loss.item() == pytest.approx(-np.mean(gains), rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_advantage_with_a_critic_by_hand(decay):
    """A_k is the sum of the later changes of the value, each decayed per decision, the last of them to the reward; it
    is then normalised over the decisions made, and nothing behind an episode's end counts."""
    value, reward = torch.rand(3, 4), torch.tensor([1.0, 0.0, 1.0])
    made, expected, mask = [4, 2, 1], [], torch.zeros(3, 4)
    for n, K in enumerate(made):
        path = [*value[n, :K].tolist(), reward[n].item()]
        mask[n, :K] = 1
        expected += [sum(decay ** (j - k) * (path[j + 1] - path[j]) for j in range(k, K)) for k in range(K)]
    advantage = ir.lambda_advantage(value, reward, mask, decay)
    assert np.allclose(advantage[mask > 0], (expected - np.mean(expected)) / (np.std(expected) + 1e-3), atol=1e-4)
    assert not advantage[mask == 0].any()


def test_critic_learns_the_chances():
    """From episodes that succeed at 0.9 or 0.2, as their first residual tells, the critic, which began below 0.05,
    learns both chances, at all decisions."""
    run, generator = make_run(), generators()[1]
    critic, residual = ir.Critic(run.config), torch.zeros(4000, 3, run.config.dim)
    residual[::2, 0] = 1
    chance = torch.tensor([0.9, 0.2]).repeat(2000)
    reward, mask = (torch.rand(4000, generator=generator) < chance).float(), torch.ones(4000, 3)
    assert critic(residual).sigmoid().max() < 0.05
    optimiser = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(100):
        ir.update(critic, ir.value_loss(critic(residual), reward, mask), [optimiser], [])
    assert torch.allclose(critic(residual).sigmoid(), chance[:, None].expand(-1, 3), atol=0.05)


def test_thinned_batch_has_the_same_gradient():
    """Thinning keeps every success and the asked number of failures; averaged over many draws, the advantages of the
    episodes are those of the whole batch, up to one factor."""
    reward = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    number, total = torch.arange(10), torch.zeros(10)
    for seed in range(2000):
        generator = torch.Generator().manual_seed(seed)
        thinned = ir.thin(ir.Batch(number, number, number, number, reward), 4, generator)
        assert len(thinned.reward) == 6 and thinned.reward.sum() == 2
        total[thinned.inputs] += ir.terminal_advantage(thinned.reward)
    whole = ir.terminal_advantage(reward)
    assert torch.allclose(total / total[0], whole / whole[0], atol=0.04)
    batch = ir.Batch(number, number, number, number, reward)
    assert ir.thin(batch, 8, generators()[1]) is batch


def bandit(run, policy):
    """A learner for `reinforce` without a grid: two codes an episode, a reward if the first begins above 1."""
    inner, inputs = ir.InternalLearner(run, None, None, policy), torch.ones(run.config.rl_batch, 2, 16)

    def collect(count, rng, generator):
        mean, log_std = (x.detach() for x in policy(inputs)[:2])
        code = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
        log_prob, reward = ir.gaussian_log_prob(code, mean, log_std), (code[:, 0, 0] > 1).float()
        return ir.Batch(inputs, code, log_prob, torch.ones(count, 2), reward)

    return Mock(model=policy, critic=inner.critic, optimiser=inner.optimiser, collect=collect, log_prob=inner.log_prob)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_rewarded_code_becomes_likelier(decay):
    """On a bandit that pays one code in six, `reinforce` raises success from 16% to over 80%, with a critic too."""
    run = make_run(rl_batch=256, rl_episodes=256 * 25, rl_lr=1e-2, rl_lambda=decay)
    curve = ir.reinforce(run, "rl", bandit(run, ir.Policy(run.config)))
    assert [episodes for episodes, _ in curve] == list(range(256, 256 * 26, 256))
    assert 0.08 < curve[0][1] < 0.25 and curve[-1][1] > 0.8


@pytest.mark.parametrize("anneal, means, deviation", [
    (False, [1, 1, 1, 1], [1, 1, 1, 1]), (True, [1, 0.75, 0.5, 0.25], [0, 0.25, 0.5, 0.75])
])  # fmt: skip
def test_rates_of_reinforcement(monkeypatch, anneal, means, deviation):
    """--rl_anneal lets the policy's rate fall linearly, that of its standard deviation rise; else both stay."""
    run = make_run(rl_batch=256, rl_episodes=1024, rl_epochs=1, rl_minibatches=1, rl_anneal=anneal)
    seen = []

    def update(model, loss, optimisers, schedulers):
        seen.append([group["lr"] for group in optimisers[0].param_groups])

    monkeypatch.setattr(ir, "update", update)
    ir.reinforce(run, "rl", bandit(run, ir.Policy(run.config)))
    assert np.allclose(seen, np.transpose([means, deviation]) * [run.config.rl_lr, run.config.rl_std_lr])


# ---- Runs: phases, checkpoints, messages -----------------------------------------------------------

QUICK = ["--fast", "--no-figures", "--eval_episodes", "32", "--random_episodes", "64", "--pretrain_steps", "10"]


def run_main(out, *flags) -> int:
    return ir.main([*QUICK, "--out", str(out), *flags])


def results(folder) -> dict:
    """The metrics of a run, but for the minutes it took."""
    metrics = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in metrics.items() if not name.startswith("minutes")}


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(capsys) -> str:
    """What went to stderr, which must be one line of ours."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("internal_rl: "), error
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished quick run: copy it before you change it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert run_main(folder) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_run_leaves_what_it_promises(finished):
    """The folder has config, metrics and checkpoints that the safe default of torch.load reads."""
    assert set(contents(finished)) == {"config.json", "metrics.csv", "results.json", *(f"{s}.pt" for s in ir.ORDER)}
    assert set(json.loads((finished / "config.json").read_text())) == {"seed", *ir.Config.__dataclass_fields__}
    assert all(torch.load(finished / f"{s}.pt", weights_only=True)["seed"] == 0 for s in ir.ORDER)


def test_same_seed_same_metrics(finished, tmp_path, capsys):
    """A second run with the same seed has exactly the same metrics, another seed has others; several seeds are
    collected in one file; the terminal shows a raster and a block of `key: value`."""
    assert run_main(tmp_path, "--seed", "0,1") == 0
    first, second, third = (results(folder) for folder in (finished, tmp_path / "seed-0", tmp_path / "seed-1"))
    assert first == second and first["base_excess_nats"] != third["base_excess_nats"]
    collected = json.loads((tmp_path / "grid-classroom.json").read_text())
    assert set(collected) == {"preset", "command", "machine", "versions", "seeds"}
    assert [entry["seed"] for entry in collected["seeds"]] == [0, 1]
    assert all(set(entry) == set(ir.SEED_KEYS) for entry in collected["seeds"])
    printed = capsys.readouterr().out
    assert all(f"\n{start}" in printed for start in ("true subgoal", "gate opens", "internal_rl_success: "))


def test_resume_equals_an_uninterrupted_run(finished, copied):
    """With the checkpoints of phase 3 deleted, only that phase is redone; the metrics are equal, the figures drawn."""
    for stage in ("rl", "raw"):
        (copied / f"{stage}.pt").unlink()
    assert ir.main([*(flag for flag in QUICK if flag != "--no-figures"), "--out", str(copied)]) == 0
    assert results(copied) == results(finished)
    assert (copied / "discover.pt").read_bytes() == (finished / "discover.pt").read_bytes()
    assert {path.name for path in copied.glob("*.png")} == {"switches.png", "rl_curve.png", "episode.png"}


def test_interrupted_run_resumes(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C during discovery is one line and status 130; the same command then ends as if nothing had happened."""
    with monkeypatch.context() as patch:
        patch.setattr(ir, "discovery_loss", Mock(side_effect=KeyboardInterrupt))
        assert run_main(tmp_path) == 130
    assert "resume" in one_line(capsys)
    assert (tmp_path / "pretrain.pt").exists() and not (tmp_path / "discover.pt").exists()
    assert run_main(tmp_path) == 0 and results(tmp_path) == results(finished)


def test_a_stage_in_its_own_process_leaves_the_same_checkpoint(finished, copied, capfd):
    """Raw-action RL in a process of its own has the metrics that it has in ours; one that fails says why in a line and
    has status 1."""
    config = ir.Config(**torch.load(copied / "raw.pt")["config"])
    run = ir.Run(config, 0, torch.device("cpu"), copied, quiet=True)
    (copied / "raw.pt").unlink()
    process = ir.start_beside(run, "raw", torch.get_num_threads())
    process.join()
    metrics = [torch.load(folder / "raw.pt")["metrics"] for folder in (finished, copied)]
    assert process.exitcode == 0 and all(metrics[0][key] == metrics[1][key] for key in ("raw_curve", "raw_rl_success"))
    run.seed = 1
    process = ir.start_beside(run, "raw", 1)
    process.join()
    assert process.exitcode == 1 and "made with --seed 0" in capfd.readouterr().err


@pytest.mark.parametrize("flags", ["--dim 16", "--rank 8", "--memory full", "--rl_temperature 0.9", "--seed 1"])
def test_checkpoint_of_another_run_is_refused(copied, capsys, flags):
    """A folder made with another value that its checkpoints depend on: status 2, one line, nothing overwritten."""
    before = contents(copied)
    assert run_main(copied, *flags.split()) == 2 and flags.split()[0] in one_line(capsys)
    assert contents(copied) == before


class Spied:
    """A config that notes which of its fields are read."""

    def __init__(self, config):
        self.config, self.read = config, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.config, name)


@pytest.mark.parametrize("world", ["small", "ant"])
@pytest.mark.parametrize("stage", ["pretrain", "steer", "discover", "raw"])
def test_a_checkpoint_is_checked_against_all_it_depends_on(stage, world):
    """Every config field that a stage reads is compared before its checkpoint is used again."""
    short = {f"{name}_{what}": n for name in ir.ORDER[:3] for what, n in (("steps", 1), ("batch", 8))}
    run = make_run(**short, random_episodes=8, obs_loss=0.1, world=world, ant_steps=20, rl_episodes=16, rl_batch=8)
    run.world = replace(run.world, limit=200)
    base = ir.BaseModel(run.config).requires_grad_(stage == "raw")
    run.config = Spied(run.config)
    functions = {"pretrain": ir.pretrain, "steer": ir.steer, "discover": ir.discover, "raw": ir.raw_rl}
    functions[stage](run, *[base] * (stage != "pretrain"))
    assert run.config.read - ir.fields_of(stage) == set()


@pytest.mark.parametrize("flags", [
    "--colour 3", "--pre laptop", "--env maze", "--preset laptop --env ant", "--world small --env ant", "--world ant",
    "--preset huge", "--world large", "--block lstm", "--memory some", "--summary half", "--dim 0", "--dim abc",
    "--dim 1.5", "--layers -1", "--control_block 9", "--noise 1.5", "--displace -0.1", "--elsewhere 0.5",
    "--forget 2", "--forget x", "--rl_lambda 1.5",
    "--kl_ramp 5,5", "--kl_ramp 5", "--rl_temperature 0", "--centred maybe", "--heads 5 --block transformer",
    "--seed -1", "--seed x", "--seed 99999999999999999999", "--threads -1", "--threads x", "--device tpu",
    "--device cuda", "--pretrain_lr nan", "--pretrain_lr inf", "--pretrain_lr -1", "--weight_decay -1",
    "--policy_std 0", "--init_scale -1", "--eval_episodes 2",
])  # fmt: skip
def test_impossible_values_are_refused(tmp_path, capsys, monkeypatch, flags):
    """Unknown flag, impossible value or device that is not there: status 2, one line that names it, no folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_main(tmp_path / "new", *flags.split()) == 2
    assert flags.split()[0] in one_line(capsys) and not (tmp_path / "new").exists()


def test_missing_checkpoint_and_unwritable_folder(tmp_path, capsys):
    """A phase without the one before it, and --out below a file, where no folder can be: status 2 and one line."""
    assert run_main(tmp_path, "--phase", "rl") == 2 and "--phase pretrain" in one_line(capsys)
    (tmp_path / "file").write_text("kept")
    assert run_main(tmp_path / "file" / "new") == 2 and "--out" in one_line(capsys)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("stage, flags", [("pretrain", ""), ("pretrain", "--pretrain_steps 1"), ("discover", "")])
def test_a_run_that_diverges_fails_clearly(copied, capsys, stage, flags):
    """Numbers that become infinite, even in the very last step: status 1, one line, no checkpoint of that phase."""
    for later in ir.ORDER[ir.ORDER.index(stage) :]:
        (copied / f"{later}.pt").unlink()
    assert run_main(copied, f"--{stage}_lr", "1e30", *flags.split()) == 1
    assert "finite" in one_line(capsys) and not (copied / f"{stage}.pt").exists()


def test_reinforcement_that_diverges_fails_clearly(players):
    """A policy loss that is no number, and action probabilities that are none, are failed runs too."""
    run = make_run(rl_batch=64, rl_episodes=64)
    learner = bandit(run, ir.Policy(run.config))
    learner.log_prob = lambda inputs, chosen: math.nan * learner.model(inputs)[0].sum(-1)
    players[1].action_head.weight.fill_(math.nan)
    for broken in (ir.reinforce, run, "rl", learner), (ir.rollout, *players[:2], ir.RawPilot(), 8, *generators()):
        with pytest.raises(ir.Failure) as failure:
            broken[0](*broken[1:])
        assert failure.value.status == 1


def test_help_explains_every_field():
    """The comment beside each field of Config is in --help under the field's flag, with its default."""
    comments, text = ir.config_comments(), re.sub(r"\W", "", ir.make_parser().format_help())
    assert list(comments) == [f.name for f in fields(ir.Config)]
    for f in fields(ir.Config):
        said = f"--{f.name} {type(f.default).__name__.upper()} {comments[f.name]} [{ir.show(f.default)}]"
        assert re.sub(r"\W", "", said) in text


@pytest.mark.skipif(not (HERE / "README.md").exists(), reason="no README.md yet")
def test_readme_mentions_only_what_exists():
    """Every --flag of the README (but pip's) is in --help, and every file under results/ that it names exists."""
    text = "\n".join(line for line in (HERE / "README.md").read_text().splitlines() if "pip install" not in line)
    flag = re.compile(r"(?<![\w-])--[a-z][\w-]*")
    assert set(flag.findall(text)) - set(flag.findall(ir.make_parser().format_help())) == set()
    files = set(re.findall(r"results/[\w./-]*\.\w+", text))
    assert {name for name in files if not (HERE / name).exists()} == set()


def test_import_is_light():
    """Importing internal_rl imports no matplotlib and prints nothing."""
    code = "import sys, internal_rl; assert not [name for name in sys.modules if name.startswith('matplotlib')]"
    found = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.skipif(os.environ.get("RUN_SLOW") != "1", reason="trains for minutes: set RUN_SLOW=1")
def test_classroom_learns(tmp_path):
    """The classroom preset, with half its RL: switches find the true subgoal changes (precision and recall at least
    0.9), and internal RL rises far above counting, to where raw-action RL does not come near."""
    assert ir.main(["--no-figures", "--rl_episodes", "50000", "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert found["switch_precision"] >= 0.9 and found["switch_recall"] >= 0.9
    assert found["internal_rl_success"] > 1000 * found["counting_success"] and found["raw_rl_success"] < 0.05
