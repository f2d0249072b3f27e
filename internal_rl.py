"""Internal RL: reinforcement learning inside a frozen sequence model (arXiv 2512.20605), on a laptop CPU.

    python internal_rl.py --env grid                      # everything, from nothing, on a small grid
    python internal_rl.py --env grid --preset laptop      # the paper's 7x7 task, a model sized for a CPU
    python internal_rl.py --env ant                       # the paper's ant
    python internal_rl.py --env grid --fast               # a smoke run of the same code, under a minute

The problem. On a small grid with four colours, an agent must make six visits: 0-1-2-3-0-1. This is the *RL task*. The
agent is not told it, and the only reward comes after the last visit. A wrong visit ends the episode. RL must first
succeed by chance, and can only then learn. RL begins with a model, the *base*, that was trained to imitate experts.
Each expert's episode has three visits, in one of 16 orders. After a visit to 0 no expert goes to 1, nor from 1 to 2,
from 2 to 3 or from 3 to 0. So the RL task has only moves from colour to colour that no expert makes. How likely is a
first success by chance? Here is how often each of the six visits is right when all visits before it were right, on
seed 0. (The base alone almost never makes the second. To measure its third visit, say, an expert of the RL task makes
the first two.) Behind them is how many episodes are solved, on six seeds. (Those of the base are episodes of RL on raw
actions, which learned nothing.) For the base that is more than the product of the six shares. We think because layouts
differ: on an easy one, all visits are easy.

    the base acts alone:                  .249, .0044, .0489, .0283, .115, .0817    8 of 12,000,000, 1 in 1,500,000
    random *codes* steer the same base:   .246, .175,  .226,  .189,  .250, .234     67 of 614,400, 1 in 9,200

RL on raw actions starts from the base, not from random moves, so it sees no reward in 200,000 episodes. RL on codes
sees some. A code is eight numbers. The codes that the model learns make the base walk to one colour each, mostly
whatever it visited before, so also from 0 to 1. Most random codes, too, lead to some colour. Nobody tells the model
which codes there are: it finds them in the trajectories of the experts. This takes three phases, in the order of this
file:

    1. pretrain: the base, a sequence model, learns to predict the next action of experts whose goals are hidden. Then
       it is frozen. The vector that its layers (blocks) pass on is the *residual stream*.

       observation o_t -> [lower blocks] -> residual e_t -> [upper blocks] -> action a_t

    2. discover: a second model, the *metacontroller*, learns to steer the frozen base: to change what it does. An
       encoder sees the whole episode, its future included, and proposes codes. A proposal has a price: the more it
       tells, the more it adds to the loss. The encoder reads a copy of the episode, in which the cells are renumbered.
       (An observation lists the cells, 0 to 24, of the colours, of the wall and of the agent. In the copy these
       numbers are exchanged at random, in the same way at all steps.) Equal cells stay equal. So the encoder sees when
       the agent stands on colour 2. But which cells are neighbours is lost, so it sees no directions: codes become
       goals, not paths. A *gate* sees the residuals up to now and the code in force. It decides when a proposal
       replaces that code. The code becomes a matrix U_t, which acts between the blocks.

       whole episode, cells renumbered -> [lower blocks] -> [encoder] -> proposal z~_t
                                                                       |
       residuals e_1 ... e_t, code z_t-1 -> [gate] beta_t   1: adopt the proposal, 0: keep the code
                                                                       |
                                                                    code z_t -> [decoder] -> U_t
                                                                                              |
       observation o_t -> [lower blocks] -> residual e_t ----------------------------- e_t + U_t e_t -> [upper] -> a_t

    3. rl: a policy takes the encoder's place. Its actions are codes, one for each opening of the gate. It learns a
       longer task from one reward at the very end. Everything else is frozen.

       residual e_t, where the gate opens -> [policy] -> code z, held until the gate opens again

A run writes its models to --out, with its measurements and a picture. Run it again to resume after an interruption.

Glossary (B episodes, T steps, F numbers in an observation, D width of the residual stream, Z numbers in a code, H in a
history or summary, R rank of a controller, M pairs of matrices that it is mixed from, K decisions of the RL policy)

    here              paper    shape        meaning                                                    where
    residual          e_t      (B, T, D)    what the lower blocks pass on, before U_t acts on it       Eq. 1
    history           h_t      (B, T, H)    recurrent summary of e_1 ... e_t                           App. D.2
    summary           s        (B, H)       recurrent summary of the whole episode                     App. D.2
    mean, log_std     mu, Sig  (B, T, Z)    the encoder's Gaussian over the next code                  Eq. 11-18
    proposal          z~_t     (B, T, Z)    sample of that Gaussian                                    App. D.2
    gate              beta_t   (B, T)       1 adopts the proposal, 0 keeps the code, .5 mixes them     Eq. 2
    code              z_t      (B, T, Z)    z_t = beta_t z~_t + (1 - beta_t) z_t-1                     Eq. 2
    controller        U_t      (D, D)       linear map of the residual, chosen by the code             Eq. 1
    kl_weight         alpha    scalar       price of each nat of a proposal (1 nat = 1.44 bits)        Eq. 3

A *subgoal* is what the expert pursues for a while: one colour, or a pair of colours on the paper's grid. The method is
never told the true subgoals; only measurements use them. One measurement, the *check*, trains controllers of its own
that are told the true subgoals. It shows whether a base can be steered at all. Where the method differs from the
paper, `Config` says "departure"; README.md has the full list.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import inspect
import io
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn.utils.rnn import pad_sequence

import envs

# ----------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------


# Other names for int and float: they say which values a flag may have. `BOUNDS` has the least and the most of each.
Many = Count = Natural = int
Chance = Weight = Rate = float
BOUNDS = {
    "Many": (16, 10**12), "Count": (1, 10**12), "Natural": (0, 10**12),
    "Chance": (0, 1), "Weight": (0, 10**6), "Rate": (1e-9, 10**6),
}  # fmt: skip
CHOICES = {"world": envs.WORLDS, "bool": ("true", "false")}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Comments: meaning (source); the defaults are the preset `classroom`. The paper's
    values are those of its grid; where its ant has others, `PRESETS` has them. A first reader may skip the list: each
    word is explained where it is used."""

    # task and evaluation
    world: str = "small"  # in envs.WORLDS (paper: App. A; small: ours)
    eval_episodes: Many = 1024  # episodes to measure with, none of them trained on; for RL 4 times as many
    # base model (paper: App. C.1, D.1)
    layers: Count = 3  # blocks (paper: 6; ant: 8)
    dim: Many = 96  # D, width of the residual stream (paper: n_e = 256)
    mlp: Count = 384  # hidden units of each MLP (paper: 512)
    swiglu: bool = False  # departure: MLPs that multiply two layers (SwiGLU) instead of ReLU
    relative_obs: bool = True  # departure: objects at their offset from the agent, not at their cell
    init_scale: Rate = 0.33  # variance of a layer's first weights x number of its inputs (paper: 0.1)
    control_block: Natural = 1  # departure: the controller acts after this many blocks (paper: layers / 2)
    blind_blocks: Natural = 0  # departure: this many of the first blocks never look at earlier steps
    # phase 1: pretrain
    pretrain_steps: Natural = 2000  # (paper: 256,000; after 6000 the base predicts better, but is harder to steer)
    pretrain_batch: Count = 128  # episodes (paper: 1024)
    pretrain_lr: Rate = 6e-3  # peak; 3 times that for embedding and head (paper: 3e-4)
    fast_optimiser: bool = True  # departure: Muon, a faster optimiser, for the blocks' matrices; rates that fall
    obs_loss: Weight = 0.0  # lambda, weight of next-observation prediction (paper: 0 or 0.01; ant: 10)
    jumps: Chance = 0.1  # departure: chance per step that the agent is put on another cell
    # phase 2, and the check: can controllers steer the base if they are told the true subgoals?
    discover_batch: Count = 64  # episodes (paper: 512)
    discover_lr: Rate = 6e-3  # peak (paper: 1e-3)
    rank: Count = 16  # R, of the controllers (paper: 16; ant: full)
    blind: Chance = 0.65  # departure: blind (no memory) for this share of phase 2, then ever less (1: always)
    forget: bool = False  # departure: when the gate opens, the upper blocks forget what came before
    temperature: Rate = 1.0  # of the actions if the base is steered, not of training (paper: 1; below 1: departure)
    steer_steps: Natural = 1000  # of the check (paper: 3200)
    # phase 2: discover (paper: App. D.2)
    history_dim: Count = 32  # H, of history and summary (paper: n_h, n_s)
    encoder_hidden: Count = 64  # hidden units of encoder and gate; the decoder has half as many (paper; gate: ours)
    code_dim: Count = 8  # Z (paper: n_z)
    shuffle: bool = True  # departure: the encoder reads a copy of the episode whose cells are renumbered at random
    discover_steps: Natural = 6000  # (paper: 64,000)
    kl_weight: Weight = 0.05  # alpha (paper: searched in 0 .. 1)
    free_codes: Chance = 0.0  # departure: codes are free for this share of phase 2; then their price rises
    force_open: bool = False  # control experiment (paper: Fig. 8): the gate is 1 at every step, in phase 3, too
    cotrain: bool = False  # control experiment (paper: Figs. 7, 8): a fresh base learns with the metacontroller
    # phase 3: internal RL, and RL on raw actions (paper: App. C.5)
    policy_dim: Count = 64  # width of the recurrent policy (paper: 256)
    least_std: Weight = 0.0  # departure: the policy's standard deviations are at least this
    rl_episodes: Natural = 200_000  # (paper: up to 100,000 x 1024)
    rl_batch: Count = 1024  # episodes collected at a time (paper)
    rl_lr: Rate = 2e-3  # peak (paper: 3e-5)
    rl_epochs: Count = 3  # passes over a batch (paper: 1)
    rl_minibatches: Count = 4  # updates per pass (paper: 1)
    rl_clip: Chance = 0.5  # PPO keeps the ratio of probabilities, new to old, within 1 +- this (usual: 0.2)
    raw_lr: Rate = 1e-4  # peak of raw-action RL, which fine-tunes the base (paper: 3e-5)


# ----------------------------------------------------------------------------------------------------
# Base model (paper: App. C.1, D.1)
#
# In: the observations of an episode. Out: for each step, the expert's next action. The model is a causal transformer:
# a step may look at itself and at the steps before it, never ahead. So it remembers its whole episode.
#
# Between the blocks, each step has a vector of D numbers: the residual stream. Every block adds something to it. A
# controller will later act on that vector after block 1 of 3. Block 1 is the lower part, blocks 2 and 3 are the upper.
#
# A *blind* episode is read without memory: each of its steps looks at itself alone. The model then acts as if the
# episode began at this step. Phase 2 says what this is good for. On the 7x7 grid memory can also begin anew at some
# steps. `faded` says where: it has one number for each step, and where it falls, memory begins anew. With faded =
# 0, 0, -99, -99, step 4 sees step 3, but not steps 1 and 2. In a blind episode it falls at every step. In the
# attention, the weight that step t gives to an earlier step s is multiplied by exp(faded_t - faded_s); then all
# weights are divided by their sum.
#
# Each block can read a whole episode at once (T > 1), or one step at a time (T = 1). Then `past` carries along what
# the earlier steps left behind; it is empty where an episode starts.
# ----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal multi-head attention with a learned bias for each distance in time, as in T5."""

    HEADS, BUCKETS, FARTHEST = 4, 32, 128  # (paper)

    def __init__(self, c: Config):
        super().__init__()
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(self.HEADS, self.BUCKETS))
        self.out = nn.Linear(c.dim, c.dim, bias=False)

    def bucket(self, distance):
        """Distances 0 to 15 have a bucket each, longer ones share buckets on a log scale."""
        exact = self.BUCKETS // 2
        ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(self.FARTHEST / exact)
        coarse = exact + (ratio * (self.BUCKETS - exact)).long()
        return torch.where(distance < exact, distance, coarse.clamp(max=self.BUCKETS - 1))

    def added_to_scores(self, T, S, faded):
        """For the last T of S steps: a bias for the distance to each step, plus faded_t - faded_s; -inf ahead.
        S counts the steps of the past, too; T those that are read now."""
        steps = torch.arange(S, device=self.bias.device)
        distance = steps[S - T :, None] - steps  # (T, S)
        added = self.bias[:, self.bucket(distance.clamp_min(0))][None]  # (1, HEADS, T, S)
        if faded is not None:
            added = added + (faded[:, S - T :, None] - faded[:, None])[:, None]
        return added.masked_fill(distance < 0, -torch.inf)  # no step looks ahead

    def forward(self, x, faded=None, past=None):
        """x (B, T, D), past: keys and values of earlier steps -> y (B, T, D), past.

        faded (B, S), for all S steps up to now. None: 0, so nothing is forgotten."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.HEADS, -1).permute(2, 0, 3, 1, 4)  # (3, B, HEADS, T, .)
        queries, new = qkv[0], qkv[1:]
        past = new if past is None else torch.cat([past, new], dim=3)
        added = self.added_to_scores(T, past.shape[3], faded)
        y = F.scaled_dot_product_attention(queries, *past, attn_mask=added)
        return self.out(y.transpose(1, 2).reshape(B, T, D)), past


def each_alone(x):
    """x (B, T, ...) -> `faded` (B, T) of steps that remember nothing but themselves."""
    return -1e4 * torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


class MLP(nn.Module):
    """ReLU MLP as in the paper. Or SwiGLU, for the 7x7 grid and the ant: a product of two layers, one of them through
    a SiLU. A product may help there: the next move depends on which goal the expert has and on where it lies."""

    def __init__(self, c: Config):
        super().__init__()
        self.up = nn.Linear(c.dim, c.mlp, bias=False)
        self.gating = nn.Linear(c.dim, c.mlp, bias=False) if c.swiglu else None
        self.down = nn.Linear(c.mlp, c.dim, bias=False)

    def forward(self, x):
        if self.gating is None:
            return self.down(F.relu(self.up(x)))
        return self.down(F.silu(self.gating(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)). A blind one reads all episodes blind."""

    def __init__(self, c: Config, blind: bool):
        super().__init__()
        self.blind = blind
        self.attention_norm, self.mlp_norm = nn.RMSNorm(c.dim), nn.RMSNorm(c.dim)
        self.attention = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x, faded=None, past=None):
        if self.blind:
            faded, past = each_alone(x), None
        y, past = self.attention(self.attention_norm(x), faded, past)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), past


class BaseModel(nn.Module):
    """The sequence model that is pretrained, then frozen. A controller may act between `lower` and `upper`.

    Its embedding and its head depend on the kind of world; both come after the method ("What the method rests on")."""

    def __init__(self, c: Config):
        super().__init__()
        world = envs.WORLDS[c.world]
        self.control_block = c.control_block
        self.embed = EMBEDDINGS[world.kind](c, world)
        self.blocks = nn.ModuleList(Block(c, blind=i < c.blind_blocks) for i in range(c.layers))
        self.norm = nn.RMSNorm(c.dim)
        self.head = HEADS[world.kind](c, world)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(c.init_scale / module.in_features) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def run_blocks(self, blocks, x, faded, past):
        """x (B, T, D), past: one entry for each block, or None at the start -> x (B, T, D), past."""
        after = []
        for block, before in zip(blocks, past or [None] * len(blocks)):
            x, left_behind = block(x, faded, before)
            after.append(left_behind)
        return x, after

    def lower(self, obs, faded=None, past=None):
        """Observations (B, T, F) -> residual (B, T, D), past."""
        return self.run_blocks(self.blocks[: self.control_block], self.embed(obs), faded, past)

    def upper(self, residual, faded=None, past=None):
        """residual (B, T, D) -> features (B, T, D), past. The head turns features into a distribution of actions."""
        x, past = self.run_blocks(self.blocks[self.control_block :], residual, faded, past)
        return self.norm(x), past

    def forward(self, obs):
        """Observations (B, T, F) -> features (B, T, D) of the model left alone."""
        return self.upper(self.lower(obs)[0])[0]


# ----------------------------------------------------------------------------------------------------
# Metacontroller (paper: Sec. 3, App. D.2, Eqs. 1-3 and 11-18)
#
# In: residuals of the frozen base. Out: changed residuals, so that the base acts as if it pursued a chosen goal.
# While the metacontroller learns, an encoder proposes the codes. It gets residuals of its own, of the renumbered copy,
# and may look at the whole episode, future included. In phase 3 a policy proposes the codes. The gate sees no future,
# so phase 3 can use it, too.
# ----------------------------------------------------------------------------------------------------


class Controller(nn.Module):
    """Linear control of the residual stream, Eq. 1: e + U e, where U (D, D) has at most rank R.

    U is mixed from M learned pairs of matrices, inn_m and out_m, each (R, D). Their M weights w come from the code
    (`Metacontroller.control`):

        inn(w) = sum_m w_m inn_m        what U reads from the residual
        out(w) = sum_m w_m out_m        what U writes into it
        U e    = out(w)^T ( inn(w) e )

    U e is computed from right to left, so no D x D matrix is built. The control is linear in e. It is not linear in w
    or in the code, because both factors depend on w."""

    def __init__(self, c: Config, M: int):
        super().__init__()
        self.inn = nn.Parameter(torch.randn(M, c.rank, c.dim) * c.dim**-0.5)
        self.out = nn.Parameter(torch.zeros(M, c.rank, c.dim))  # at first U is zero: nothing is steered

    def forward(self, residual, weight):
        """residual (B, T, D), weight (B, T, M) -> controlled residual (B, T, D)."""
        read = torch.einsum("btd,mrd,btm->btr", residual, self.inn, weight)
        return residual + torch.einsum("btr,btm,mrd->btd", read, weight, self.out)


def shift_right(x):
    """x_1 ... x_T -> 0, x_1 ... x_T-1 along time (dim 1)."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


class Metacontroller(nn.Module):
    """Discovers codes and when to switch them: encoder, gate, decoder and controller.

    The encoder reads a renumbered copy of the episode, the gate the episode itself. So there are two histories. One
    GRU, `history`, computes both (in the paper they are one h_t). A second GRU, `embedder`, makes the encoder's
    summary of the whole episode. `switch` is the gate's network."""

    threshold = 0.5  # a gate above this is open (paper)

    def __init__(self, c: Config):
        super().__init__()
        self.force_open = c.force_open
        D, H, Z = c.dim, c.history_dim, c.code_dim
        self.read = nn.RMSNorm(D, elementwise_affine=False)  # scales the residuals to a root mean square of 1
        self.history = nn.GRU(D, H, batch_first=True)
        self.embedder = nn.GRU(D, H, batch_first=True)
        self.encoder = nn.Sequential(
            nn.Linear(D + H + H, c.encoder_hidden), nn.ReLU(), nn.Linear(c.encoder_hidden, 2 * Z)
        )
        self.switch = nn.Sequential(nn.Linear(D + H + Z, c.encoder_hidden), nn.ReLU(), nn.Linear(c.encoder_hidden, 1))
        self.decoder = nn.Sequential(nn.Linear(Z, c.encoder_hidden // 2), nn.SiLU())
        self.controller = Controller(c, M=c.encoder_hidden // 2 + 1)
        nn.init.zeros_(self.switch[2].bias)
        self.encoder[2].bias.data[Z:] -= 2  # first standard deviation e^-2: little noise, so that the mean can be seen

    def encode(self, residual, last):
        """Gaussians of the proposals: residual (B, N, D) -> mean and log_std (B, N, Z). On the grid N is T + 1: all
        steps, then the last observation. For the ant there are fewer (see `propose`, phase 2). At each, the encoder
        reads the residual, the history before it, and the episode's summary.

        last (B,): the place of the last observation among the N, counted from 0. Padding follows it. For the summary
        a GRU reads backwards, from place `last` to place 0. Its output there, after last + 1 inputs, is the summary.
        (What it reads after that, in shorter episodes, does not count.)"""
        x = self.read(residual)
        history = shift_right(self.history(x)[0])
        rows, steps = (torch.arange(size, device=x.device) for size in x.shape[:2])
        backwards = (last[:, None] - steps).clamp_min(0)  # (B, N)
        reversed_x = x[rows[:, None], backwards]
        summary = self.embedder(reversed_x)[0][rows, last]  # (B, H)
        summary = summary[:, None].expand(-1, x.shape[1], -1)
        return self.encoder(torch.cat([x, history, summary], dim=-1)).chunk(2, dim=-1)

    def gate(self, residual, history, code):
        """beta_t = f_switch(e_t, h_t-1, z_t-1), between 0 and 1: (B, D), (B, H), (B, Z) -> (B,)."""
        if self.force_open:
            return torch.ones_like(code[:, 0])
        return torch.sigmoid(self.switch(torch.cat([self.read(residual), history, code], dim=-1))).squeeze(-1)

    def integrate(self, residual, proposal, threshold=None):
        """Temporal integration, Eq. 2: z_t = beta_t z~_t + (1 - beta_t) z_t-1. An example, with codes of one number:

            step          1     2     3     4     5     6
            proposal     10    20    30    40    50    60
            gate          1     0     0     1    .5     0      1: adopt the proposal, 0: keep the code
            code, soft   10    10    10    40    45    45
            code, hard   10    10    10    40    40    40      threshold .5: a gate of .5 is not above it

        In training the gate is *soft*, any number between 0 and 1, so that gradients reach it. With a threshold it is
        *hard*: a code is replaced as a whole where the gate is above the threshold, or not at all. RL needs that, as a
        policy must know when it decides; measurements use it, too. After training this makes little difference: the
        gate is then near 0 or near 1 at all steps. (In RL, `CodePilot` does the same, one step at a time.)

        residual (B, T, D), proposal (B, T, Z) -> code (B, T, Z), gate (B, T), before any threshold."""
        history = shift_right(self.history(self.read(residual))[0])
        gate = torch.ones_like(proposal[:, 0, 0])  # the first step always adopts
        code = proposal[:, 0]
        codes, gates = [code], [gate]
        for t in range(1, proposal.shape[1]):
            gate = self.gate(residual[:, t], history[:, t], code)
            adopt = gate if threshold is None else (gate > threshold).float()
            code = adopt[:, None] * proposal[:, t] + (1 - adopt[:, None]) * code
            codes.append(code)
            gates.append(gate)
        return torch.stack(codes, dim=1), torch.stack(gates, dim=1)

    def control(self, residual, code):
        """Steer: residual (B, T, D), code (B, T, Z) -> (B, T, D). Weights w = [decoder(z), 1]. The 1 gives inn(w) and
        out(w) a part that is the same for all codes, like a bias."""
        weight = F.pad(self.decoder(code), (0, 1), value=1.0)
        return self.controller(residual, weight)


def code_kl(mean, log_std):
    """KL( N(mean, std^2) || N(0, I) ) in nats, (B, T, Z) -> (B, T): what a proposal tells beyond pure noise.

    N(0, I) is the *prior*: what a code looks like when nobody has said anything. To propose it is free."""
    return 0.5 * (mean**2 + torch.exp(2 * log_std) - 2 * log_std - 1).sum(-1)


# ----------------------------------------------------------------------------------------------------
# Phase 1: pretrain the base model (paper: App. C.1)
#
# In: trajectories of experts that pursue goals nobody tells us. Out: a model that predicts what they do next. For this
# it must work out two things: which goal an expert pursues, from its moves so far, and how to get there. A batch of B
# trajectories (`envs.Episodes`) has observations `obs` (B, T + 1, F), the actions of the expert `target` (B, T, ...),
# and a `mask` (B, T), which is False where a shorter one is padded.
#
# Each phase is a function of a `run` and of the models of earlier phases, of nothing else. Helpers that come later:
#
#     run.config, run.world, run.device      what the run was started with (`Run`, near the end of the file)
#     run.seeded(phase)                      seeds all random generators, returns numpy's
#     run.tensor(array), run.log(...)        numpy array -> tensor; shows progress
#     update(...), rate(...)                 one step of the optimisers; the learning rate now, as a share of its peak
#     price, proposing_steps, take_steps, put_back, forget_at      for the 7x7 grid and the ant: after phase 3
#
# In phases 1 and 2 a loss function returns a sum over steps, averaged over episodes. Before an update it is divided by
# the mean length of the batch's episodes.
#
# Trajectories have *jumps*: after one step in ten the agent is put on another free cell, and the expert goes on from
# there. Why? An expert takes shortest paths. A base that has seen nothing else knows little of what to do away from
# them, and a controller may lead it anywhere. Jumps show it what experts do on all free cells, whatever came before. A
# jump never leads onto a colour, so it is no visit, and the visits of an episode stay those of its task. (No jump
# follows a visit, as the base should see how experts leave a colour. Phase 2's trajectories have jumps, too; RL has
# none.)
# ----------------------------------------------------------------------------------------------------


def expert_batches(run: Run, rng: np.random.Generator, batch: int):
    """Endless batches of fresh expert trajectories. Each has episodes of similar length: that is less padding."""
    while True:
        episodes = run.world.episodes(batch * max(1, 4096 // batch), rng)
        order = np.argsort(episodes.lengths, kind="stable").reshape(-1, batch)
        for i in rng.permutation(len(order)):
            yield episodes.take(order[i])


def action_nll(run: Run, base: BaseModel, features, episodes: envs.Episodes):
    """-ln p(the expert's action), nats; features (B, T, D) -> (B, T), 0 in the padding."""
    return -base.head(features).log_prob(run.tensor(episodes.target)) * run.tensor(episodes.mask)


def pretrain_loss(run: Run, base: BaseModel, episodes: envs.Episodes):
    """sum_t -ln p(a_t | o_1:t) - lambda ln p(o_t+1 | o_1:t), mean over episodes, nats -> (loss, stats)."""
    obs, mask = run.tensor(episodes.obs), run.tensor(episodes.mask)
    features = base(obs[:, :-1])
    nll = action_nll(run, base, features, episodes).sum(1).mean()
    if not run.config.obs_loss:
        return nll, {"nll": nll.item()}
    obs_nll = (base.head.next_nll(features, obs[:, 1:]) * mask).sum(1).mean()
    return nll + run.config.obs_loss * obs_nll, {"nll": nll.item(), "obs_nll": obs_nll.item()}


def pretrain(run: Run) -> BaseModel:
    """Phase 1: train the base, then freeze it."""
    c = run.config
    rng = run.seeded("pretrain")
    base = BaseModel(c).to(run.device)
    optimisers = pretrain_optimisers(c, base)
    for step, episodes in zip(range(c.pretrain_steps), expert_batches(run, rng, c.pretrain_batch)):
        loss, stats = pretrain_loss(run, base, episodes)
        update(base, loss / episodes.lengths.mean(), optimisers, rate(c, step / c.pretrain_steps))
        run.log(step + 1, c.pretrain_steps, "steps", nats_per_step=stats["nll"] / episodes.lengths.mean(), **stats)
    return base.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------
# Phase 2: discover controllers and when to switch them (paper: Sec. 3, App. D.2, Eq. 3)
#
# In: the frozen base and fresh trajectories of the same experts. Out: a metacontroller.
#
# Its encoder knows what the expert is about to do, and tells the base through the code, so that the base predicts the
# expert better. But each nat of a proposal costs alpha, adopted or not; to open the gate is free. So the encoder
# should tell only what the base cannot know. The base finds the way to a goal by itself. What it cannot know is the
# goal, and it is enough to name it once, when it changes.
#
# Why does the gate open where the goal changes, and stay shut at other steps? Where there is nothing new to tell, the
# encoder proposes pure noise, N(0, I), which is free. To adopt noise would destroy the code in force, so the gate
# learns to stay shut there. It opens at the step at which the agent stands on a colour, as the next move already
# depends on the new goal. It sees in the residual that it is such a step. (This is the paper's reason. On the small
# grid it cannot be the only one: with `--kl_weight 0` the gate opens at the same steps. We do not know why.)
#
# Who sees what:
#                         the base               the gate           the encoder               the policy
#     phase 1             all steps so far
#     phase 2, begin      each step alone        all steps so far   all steps, renumbered
#     phase 2, end        all steps so far       all steps so far   all steps, renumbered
#     phase 3             all steps so far       all steps so far                             step 1, open gates
# (This is the small grid. The others are in "What the 7x7 grid and the ant need besides".)
# Gate, encoder and policy see residuals. They remember what they saw, in GRUs of their own, even if the base is blind.
# When the base is not blind, each residual that gate and policy see tells of earlier steps, too.
#
# To tell the next moves, or the place to go to, costs about as little as to tell the colour, and predicts the expert
# as well. Two departures from the paper make codes name the colour:
# 1. The encoder reads a copy of the episode in which the cells of the grid are renumbered at random, in the same way
#    at all steps. The copy shows when the agent stands on which colour, but no directions and no places. (Without the
#    copy the gate opens at the same steps, but a code does not say which colour, and RL fails.)
# 2. At first the base is blind. With memory it would know that experts go from 0 to 2 or 3, and from 3 to 1 or 2. Then
#    one code could mean 2 after 0, but 1 after 3 ("the lower of the two"). No code would lead from 0 to 1, and RL
#    needs that. One step after 0, a blind base does not know that it comes from there. Such a code cannot guide it any
#    more; one that names the goal itself, "go to 1", can.
#    Later, ever more episodes are read with memory. In phase 3 the base remembers, as the paper's does, so controllers
#    must learn to steer such a base. The codes that were learned blind keep their meaning. And they work even where
#    phase 2 never uses them: no expert goes from 0 to 1, so right after 0 a base with memory avoids 1, and no code is
#    trained to overrule it. All the same, .175 of the random codes lead from 0 to 1 (see the top of this file). If the
#    base ignored the past, and random codes named the four colours equally often, .25 would. We do not know why.
# ----------------------------------------------------------------------------------------------------


def ramp(progress: float, start: float, end: float) -> float:
    """0 until `start`, then rising to 1 at `end`."""
    return 1.0 if progress >= end else max(0.0, (progress - start) / (end - start))


def draw_blind(run: Run, obs, progress: float):
    """`faded` (B, T) of a batch in which some episodes are read blind; obs (B, T, F). With `blind` .65 all episodes
    are blind until progress .65, then ever fewer, and none from 1.5 x .65 = .975 on. (A slower fall was worse.)"""
    share = 1 - ramp(progress, run.config.blind, 1.5 * run.config.blind)
    if not share:
        return torch.zeros(obs.shape[:2], device=run.device)
    blind = torch.rand(len(obs), device=run.device) < share
    return torch.where(blind[:, None], each_alone(obs), 0.0)


def propose(run: Run, base: BaseModel, meta: Metacontroller, episodes: envs.Episodes, rng, progress: float = 1.0):
    """The encoder's proposals (B, T, Z), drawn from its Gaussians, and the nats that each costs (B, T).

    The encoder proposes at every step; for the ant at fewer (`proposing_steps`). Elsewhere the proposal is noise, and
    free. The encoder reads a copy of these steps, then the last observation, which shows the last visit. The lower
    blocks read the copy blind all through phase 2 (unless `blind` is 0): in the copy nearly every step is a jump,
    unlike in phase 1, so such a past would tell the base nothing."""
    view = run.world.shuffled(episodes.obs, rng) if run.config.shuffle else episodes.obs
    proposes = proposing_steps(run, episodes, progress)  # (B, T), on the grid True up to the end of the episode
    read, last = take_steps(run, view, proposes, episodes.lengths)  # on the grid the whole copy, (B, T + 1, F)
    residual, _ = base.lower(read, draw_blind(run, read, progress=0))  # progress 0: all blind
    said = torch.cat(meta.encode(residual, last), dim=-1)
    mean, log_std = put_back(run, said, proposes).chunk(2, dim=-1)
    return mean + torch.exp(log_std) * torch.randn_like(mean), code_kl(mean, log_std)


def discovery_loss(run: Run, base, meta, episodes: envs.Episodes, rng, progress: float):
    """sum_t -ln p(a_t | o_1:t, z_1:t) + alpha KL_t, mean over episodes, nats -> (loss, stats). Eq. 3.

    progress (0 to 1): the share of phase 2 that is done. The base is frozen (without `cotrain`). Gradients of the
    action loss flow back through its upper blocks to the controller, and from there to decoder, gate and encoder."""
    obs, mask = run.tensor(episodes.obs[:, :-1]), run.tensor(episodes.mask)
    faded = draw_blind(run, obs, progress)
    residual, _ = base.lower(obs, faded)
    proposal, kl = propose(run, base, meta, episodes, rng, progress)
    code, gate = meta.integrate(residual, proposal)
    if run.config.forget:  # then memory begins anew where the gate opens
        faded = faded + forget_at(gate)
    features, _ = base.upper(meta.control(residual, code), faded)
    nll = action_nll(run, base, features, episodes).sum(1).mean()
    kl = kl.sum(1).mean()  # of every proposal, adopted or not
    stats = {"nll": nll.item(), "kl": kl.item(), "gates": (gate * mask).sum(1).mean().item()}
    return nll + price(run.config, progress) * kl, stats  # price: alpha; for the ant 0 at first


def discover(run: Run, base: BaseModel) -> Metacontroller:
    """Phase 2: train the metacontroller on the frozen base, then freeze it, too."""
    c = run.config
    rng = run.seeded("discover")
    meta = learner = Metacontroller(c).to(run.device)  # learner: all that learns
    optimisers = [torch.optim.AdamW(meta.parameters(), lr=c.discover_lr, weight_decay=WEIGHT_DECAY)]
    if c.cotrain:  # the base begins anew, and learns with the metacontroller
        base.load_state_dict(BaseModel(c).state_dict())
        learner = nn.ModuleList([meta, base.requires_grad_(True)])
        optimisers += pretrain_optimisers(c, base)
    for step, episodes in zip(range(c.discover_steps), expert_batches(run, rng, c.discover_batch)):
        progress = step / c.discover_steps
        loss, stats = discovery_loss(run, base, meta, episodes, rng, progress)
        update(learner, loss / episodes.lengths.mean(), optimisers, rate(c, progress))
        run.log(step + 1, c.discover_steps, "steps", **stats)
    learner.requires_grad_(False)
    return meta


# ----------------------------------------------------------------------------------------------------
# Acting: the base plays in the environment, and a pilot may steer it
#
# In: a batch of episodes at their start. Out: what happened until their ends. At each step the loop asks a *pilot* to
# change the residual. There are three: one that does nothing, one that is told the true subgoals (in the check after
# the method), and one that holds codes and asks for a new one when the gate opens. A pilot also says how the base
# acts and remembers: at which temperature, whether blind, and whether it forgets where the gate `opened`.
# ----------------------------------------------------------------------------------------------------


class Pilot:
    """Steers the base while it acts. This one leaves it alone."""

    def __init__(self, temperature: float = 1.0, blind=False, forget=False):
        self.temperature = temperature  # of the actions
        self.blind = blind  # the base is read blind
        self.forget = forget and not blind  # upper blocks forget where `opened`

    def steer(self, residual, batch, rows):
        """residual (B, D) of the episodes that have not ended -> controlled residual (B, D). rows (B,): their indices
        in the batch as it began. batch: the episodes; only the check's pilot, `LabelPilot`, may look into them."""
        return residual


class CodePilot(Pilot):
    """The metacontroller without its encoder (paper: Alg. 1). At the first step, and where the gate opens, `choose`
    gives a new code. At all other steps the code is held. choose(residual (B, D), rows (B,)) -> code (B, Z)."""

    def __init__(self, run: Run, B: int, meta: Metacontroller, choose):
        c, device = run.config, run.device
        super().__init__(c.temperature, c.blind == 1, c.forget)
        self.meta, self.choose = meta, choose
        self.history = torch.zeros(1, B, c.history_dim, device=device)
        self.code = torch.zeros(B, c.code_dim, device=device)
        self.step, self.forced = 0, {0}  # steps at which the gate opens in any case: the first

    def steer(self, residual, batch, rows):
        history = self.history[:, rows]  # of the steps before this one
        self.gate = self.meta.gate(residual, history[0], self.code[rows])
        self.opened = (self.gate > self.meta.threshold) | (self.step in self.forced)
        deciding = rows[self.opened]
        if len(deciding):
            self.code[deciding] = self.choose(residual[self.opened], deciding)
        _, history = self.meta.history(self.meta.read(residual)[:, None], history)
        self.history[:, rows] = history
        self.step += 1
        return self.meta.control(residual[:, None], self.code[rows][:, None])[:, 0]


class Decisions(NamedTuple):
    """B finished episodes of up to K decisions. In RL on raw actions these are the actions, one a step. In internal RL
    they are the codes, one for each opening of the gate."""

    inputs: torch.Tensor  # observations (B, K, F); if codes were chosen, residuals (B, K, D)
    chosen: torch.Tensor  # actions (B, K, ...), or codes (B, K, Z)
    log_prob: torch.Tensor  # (B, K) when it was chosen
    mask: torch.Tensor  # (B, K) 1 for decisions that were made
    reward: torch.Tensor  # (B,) at the end


def by_episode(steps: list[tuple]) -> list:
    """Sorts by episode what was collected step by step. steps: for each step a tuple (indices of some episodes (B',),
    data of these episodes (B', ...), more data, ...). -> each kind of data as (B, T, ...), 0 in the padding; last the
    mask (B, T)."""
    rows, *parts = (torch.cat(column) for column in zip(*steps))  # all steps behind each other
    parts.append(torch.ones(len(rows), device=rows.device))
    order = rows.argsort(stable=True)  # by episode, and by time within an episode
    counts = rows.bincount().tolist()  # the first step has all episodes, so none is missing
    return [pad_sequence(part[order].split(counts), batch_first=True) for part in parts]


@torch.no_grad()
def rollout(run: Run, base: BaseModel, pilot, batch: envs.Batch) -> tuple[Decisions, np.ndarray]:
    """Play the episodes of a batch to their ends -> all actions, and the colour visited by each step (B, T), else -1.

    Episodes step together. Those that have ended are dropped, so that nothing is computed for them."""
    alive, steps = np.arange(len(batch)), []
    lower_past = upper_past = None  # what the base remembers
    opened = torch.zeros(len(batch), run.world.limit, device=run.device)  # 1 where a gate was open
    for t in range(run.world.limit):
        obs, rows = run.tensor(batch.observe()), run.tensor(alive)
        residual, lower_past = base.lower(obs[:, None], past=lower_past)
        controlled = pilot.steer(residual[:, 0], batch, rows)
        if pilot.forget:
            opened[rows, t] = pilot.opened.float()
        faded = forget_at(opened[rows, : t + 1]) if pilot.forget else None
        features, upper_past = base.upper(controlled[:, None], faded, upper_past)
        if not features.isfinite().all():
            raise Failure(f"{run.phase}: the model's actions are no numbers; lower the learning rate", 1)
        actions = base.head(features[:, 0], pilot.temperature)
        action = actions.sample()
        visit, reward, done = batch.step(action.cpu().numpy())  # visit: the colour, or -1
        steps.append((rows, obs, action, actions.log_prob(action), run.tensor(reward), run.tensor(visit)))
        if done.all():
            break
        if done.any():
            alive, kept = alive[~done], run.tensor(np.flatnonzero(~done))
            batch.select(~done)
            keep = lambda past: [part.index_select(1, kept) for part in past]  # faster than part[:, kept]
            lower_past, upper_past = keep(lower_past), keep(upper_past)
        if pilot.blind:  # the base remembers nothing
            lower_past = upper_past = None
    obs, action, log_prob, reward, visited, mask = by_episode(steps)
    played = Decisions(obs, action, log_prob, mask, reward.sum(1))
    return played, visited.where(mask > 0, -1).cpu().numpy()


# ----------------------------------------------------------------------------------------------------
# Phase 3: internal RL (paper: App. C.5, Algorithms 1-3)
#
# In: the frozen base and metacontroller. Out: a policy that chooses codes. It acts at step 1 and where the gate
# opens, so an episode of many steps is a few decisions for it. This is *contracted time*:
#
#     gate      |...|.....|..|....|...|.....      | open: the policy chooses a code, . shut: the code is held
#     code      aaaabbbbbbcccdddddaaaabbbbbb      28 steps, 6 decisions
#     reward                               1      one, at the very end
#
# Nobody tells the policy its task. Under random codes the base walks to random colours, so some episodes succeed by
# chance, and RL can begin. A success is credited to six decisions, not to each move; all six get the full advantage.
# ----------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Causal policy over codes: a GRU whose state advances at decisions, then a Gaussian.

    At first it is the codes' prior, N(0, I). In RL there is no KL, so to leave the prior costs nothing. For the 7x7
    grid and the ant, its standard deviations stay above `least_std`."""

    def __init__(self, c: Config):
        super().__init__()
        self.least_std = c.least_std
        self.read = nn.RMSNorm(c.dim, elementwise_affine=False)  # as in the metacontroller
        self.gru = nn.GRU(c.dim, c.policy_dim, batch_first=True)
        self.head = nn.Linear(c.policy_dim, 2 * c.code_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, residual, state=None):
        """residual (B, K, D) at K decisions -> distribution of codes (B, K, Z), state (1, B, policy_dim). A code is
        one choice: its log-probability is the sum over its Z numbers."""
        x, state = self.gru(self.read(residual), state)
        mean, log_std = self.head(x).chunk(2, dim=-1)
        return normal(mean, log_std.exp().clamp_min(self.least_std)), state


class PolicyCodes:
    """Chooses the codes of B episodes for a `CodePilot` by the policy, and writes down every decision.

    Without `sample` it takes the means of the policy instead of samples, to evaluate it."""

    def __init__(self, run: Run, B: int, policy: Policy, sample: bool = True):
        self.policy, self.sample, self.made = policy, sample, []
        self.state = torch.zeros(1, B, run.config.policy_dim, device=run.device)

    def __call__(self, residual, rows):
        """residual (B, D) of the episodes `rows` (B,) whose gate is open -> code (B, Z)."""
        codes, state = self.policy(residual[:, None], self.state[:, rows])
        self.state[:, rows] = state
        code = codes.sample() if self.sample else codes.mean  # Alg. 2: z ~ pi(z | e_t, own state)
        self.made.append((rows, residual, code[:, 0], codes.log_prob(code)[:, 0]))
        return code[:, 0]


def play_codes(run: Run, base, meta, policy: Policy, count: int, rng, sample=True) -> tuple[Decisions, float]:
    """Internal RL plays `count` episodes -> its decisions, which are codes, not the actions, and success."""
    codes = PolicyCodes(run, count, policy, sample)
    played, _ = rollout(run, base, CodePilot(run, count, meta, codes), run.world.batch(count, rng))
    return Decisions(*by_episode(codes.made), played.reward), played.reward.mean().item()


def terminal_advantage(reward):
    """A = (reward - mean) / (deviation + 1e-3) over the batch: (B,) -> (B,), for all decisions of an episode."""
    return (reward - reward.mean()) / (reward.std(correction=0) + 1e-3)


def policy_loss(log_prob, old_log_prob, advantage, mask, clip: float):
    """Minus PPO's clipped objective, mean over decisions. log_prob, old_log_prob, mask (B, K), advantage (B,).

        ratio     = new probability of the decision / old probability
        objective = min( ratio A, clip(ratio, 1 - clip, 1 + clip) A )"""
    ratio = torch.exp((log_prob - old_log_prob) * mask)  # 1 in the padding
    advantage = advantage[:, None]
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(objective * mask).sum() / mask.sum()


def reinforce(run: Run, phase: str, model: nn.Module, peak: float, play, log_prob, enough: float = math.inf) -> None:
    """RL from one reward at the end of an episode. run.curves[phase] becomes [(episodes, success of that batch)].

    play(rng) -> Decisions, success. log_prob(inputs, chosen) -> (B, K) by the present `model`. peak: highest learning
    rate. RL ends early when the success of a batch is `enough`: `claim_credit` needs a half-trained policy.

    This is PPO without its critic: the only reward comes at the end, and the mean of the batch is its baseline. There
    is no entropy bonus. The clipped ratio allows several passes over a batch. Its bound is wide, because the first
    successes are rare: each must move the policy far."""
    c, episodes = run.config, 0
    rng = run.seeded(phase)
    curve = run.curves[phase] = []
    optimiser = torch.optim.Adam(model.parameters(), lr=peak)
    while episodes < c.rl_episodes:
        share = rate(c, episodes / c.rl_episodes)
        # collect
        made, success = play(rng)
        episodes += c.rl_batch
        curve.append((episodes, success))
        if success >= enough:
            return
        # advantage
        advantage = terminal_advantage(made.reward)
        # update: without a single success every advantage is zero, and there is nothing to learn from
        for _ in range(c.rl_epochs if advantage.any() else 0):
            order = torch.randperm(len(advantage), device=run.device)
            for index in order.chunk(c.rl_minibatches):
                longest = int(made.mask[index].sum(1).max())
                inputs, chosen, old, mask = (part[index, :longest] for part in made[:4])
                loss = policy_loss(log_prob(inputs, chosen), old, advantage[index], mask, c.rl_clip)
                update(model, loss, [optimiser], share)
        # log
        run.log(episodes, c.rl_episodes, "episodes", success=success, decisions=made.mask.sum(1).mean().item())


def internal_rl(run: Run, base: BaseModel, meta: Metacontroller) -> Policy:
    """Phase 3: train a policy over codes, then freeze it."""
    c = run.config
    run.seeded("rl")  # decides the first weights
    policy = Policy(c).to(run.device)
    play = lambda rng: play_codes(run, base, meta, policy, c.rl_batch, rng)
    log_prob = lambda residual, code: policy(residual)[0].log_prob(code)
    reinforce(run, "rl", policy, c.rl_lr, play, log_prob)
    return policy.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------
# What the 7x7 grid and the ant need besides
#
# With phase 3 the method is complete. A first reader may stop here.
#
# *The 7x7 grid*. There a subgoal is a pair of colours: first 0, then 1. A blind base cannot know if 0 was visited. A
# base that remembers everything overrules the code: after 0-1 it goes on to a pair that experts visit then, even if
# the code says another. (On the small grid it seldom does. We do not know why.) So the preset `laptop` begins blind,
# too (`blind` .36), but then the base remembers only the steps after the gate opened. For this, the blocks above the
# controller forget when the gate opens (`forget`). The block below is always blind (`blind_blocks`): the gate reads
# what comes out of it, so it cannot know yet whether the gate opens.
#
# *Both*: MLPs that multiply (`swiglu`). Actions at temperature 0.3 when the base is steered: so small a base is not
# sure enough. And a floor under the policy's standard deviations (`least_std`): without it (one run each) the first
# few successes make them small before the means are right, and such a policy tries no other codes. The small grid
# needs none of these three.
#
# *The ant*, a body with four legs on a floor of 4x4 cells. RL simulates it: a stride, one movement of its legs, takes
# about ten steps. Phases 1 and 2 do not: a training episode is put together from bodies recorded while ants walked,
# and each of its steps moves the ant by up to one and a half strides. A base with memory has never seen an ant as slow
# as in RL, and is steered badly there. So the ant's base is blind in phases 2 and 3.
#
# Besides, its gate is helped by hand. In training an ant makes 1.6 steps on the cell of a colour, in RL more than ten.
# If the gate opened at all of them, training would hardly notice, but the policy would have to choose a code at each.
# So the encoder proposes only where the ant enters another cell of its floor (an *entry*). At other steps the
# proposals are noise. To adopt noise spoils the code, so the gate opens once.
# But for the first third of phase 2 it proposes at all steps, and codes cost nothing. If they cost alpha from the
# first step on, the gate learns to stay shut on two of the colours where the ant comes straight from a neighbouring
# one (one seed). We do not know why.
#
# (On the small grid `take_steps` takes all steps, and `put_back` leaves out the last observation.)
# ----------------------------------------------------------------------------------------------------


def forget_at(gate):
    """`faded` (B, T) of episodes in which memory begins anew where the gate (B, T) opens. Say at steps 1 and 5:

        step 5 sees 5               memory begins anew: no step before 5 is seen again
        step 6 sees 6               memory begins anew once more: step 5 is not seen again
        step 7 sees 6 and 7

    Why once more at step 6? Step 5 shows the colour that was just reached. A base that remembers this colour knows
    which goals experts have next, and overrules the code. A soft gate forgets softly: `kept` is the share of memory
    that passes from the step before to this one. 1e-4 keeps the logarithm finite."""
    kept = (1 - gate) * (1 - shift_right(gate))  # (1 - beta_t) (1 - beta_t-1)
    return torch.log(1e-4 + (1 - 1e-4) * kept).cumsum(dim=1)


def price(c: Config, progress: float) -> float:
    """What a nat of a proposal costs when a share `progress` of phase 2 is done: alpha. But with `free_codes` .325, as
    for the ant, it is 0 until .325, then rises, and is alpha from .65 on."""
    return c.kl_weight * ramp(progress, c.free_codes, 2 * c.free_codes)


def proposing_steps(run: Run, episodes: envs.Episodes, progress: float) -> np.ndarray:
    """Where the encoder proposes, (B, T): at every step as long as codes are free, then at entries. On the grid every
    step is an entry."""
    free = run.config.free_codes
    if free and progress <= free:
        return episodes.mask
    return episodes.mask & run.world.is_entry(episodes.obs)[:, :-1]


def take_steps(run: Run, view, proposes, lengths):
    """Of each episode the observations where it `proposes` (B, T), then the last: view (B, T + 1, F) -> (B, N, F),
    shorter ones padded, and the place of the last among the N, (B,)."""
    is_read = np.pad(proposes, ((0, 0), (0, 1)))
    is_read[np.arange(len(view)), lengths] = True
    count = is_read.sum(axis=1)
    read = run.tensor(view[is_read]).split(count.tolist())
    return pad_sequence(read, batch_first=True), run.tensor(count - 1)


def put_back(run: Run, said, proposes):
    """What was said at the taken steps (B, N, 2 Z) -> at the steps of the episode (B, T, 2 Z). It is 0 at all
    others: mean 0 and log_std 0, so N(0, I), which is free."""
    result = said.new_zeros(*proposes.shape, said.shape[-1])
    result[run.tensor(proposes)] = torch.cat([row[:n] for row, n in zip(said, proposes.sum(axis=1))])
    return result


# ----------------------------------------------------------------------------------------------------
# What the method rests on: presets, embeddings and heads of the worlds, optimisers and rates
# ----------------------------------------------------------------------------------------------------


CLASSROOM = Config()
EASIER = dict(swiglu=True, mlp=256, temperature=0.3, least_std=0.1)  # for the 7x7 grid and the ant
PAPER = replace(
    CLASSROOM, world="paper", layers=6, dim=256, mlp=512, relative_obs=False, init_scale=0.1,
    control_block=3, pretrain_steps=256_000, pretrain_batch=1024, pretrain_lr=3e-4,
    fast_optimiser=False, obs_loss=0.01, jumps=0.0, shuffle=False, discover_steps=64_000, discover_batch=512,
    discover_lr=1e-3, blind=0.0, steer_steps=3200, kl_weight=0.17,
    policy_dim=256, rl_episodes=102_400_000, rl_lr=3e-5, rl_epochs=1, rl_minibatches=1, rl_clip=0.2,
    raw_lr=3e-5,
)  # fmt: skip
PRESETS = {
    "grid": {
        "classroom": CLASSROOM,
        "laptop": replace(
            CLASSROOM, world="paper", layers=4, blind_blocks=1, **EASIER, pretrain_steps=10_000, pretrain_batch=64,
            pretrain_lr=5e-3, jumps=0.05, steer_steps=1500, discover_steps=5000, discover_batch=32,
            discover_lr=3e-3, blind=0.36, forget=True, kl_weight=0.1,
        ),
        "paper": PAPER,
    },
    "ant": {
        "classroom": replace(
            CLASSROOM, world="ant", layers=4, dim=128, **EASIER, jumps=0.4, obs_loss=10.0, pretrain_steps=5000,
            pretrain_batch=64, pretrain_lr=5e-3, steer_steps=1600, discover_steps=7000, discover_lr=2e-3,
            blind=1.0, kl_weight=2.0, free_codes=0.325, rl_episodes=40_960, rl_batch=512, eval_episodes=512,
        ),
        "paper": replace(
            PAPER, world="ant-simulated", layers=8, control_block=4, rank=256, obs_loss=10.0,
            pretrain_steps=204_800, pretrain_batch=512, discover_steps=32_000, discover_batch=128, discover_lr=3e-4,
            rl_episodes=13_107_200, rl_batch=256,
        ),
    },
}  # fmt: skip
FAST = {
    "layers": 2, "dim": 32, "mlp": 64, "control_block": 1, "pretrain_steps": 30, "pretrain_batch": 32,
    "steer_steps": 10, "discover_steps": 20, "discover_batch": 16, "rl_episodes": 128, "rl_batch": 64,
    "eval_episodes": 16,
}  # fmt: skip
WEIGHT_DECAY = 0.03  # in phases 1 and 2 (paper)


class AbsoluteCells(nn.EmbeddingBag):
    """The paper's: a vector for each (object, cell). This is a linear layer on the paper's one-hots, 637 numbers."""

    def __init__(self, c: Config, world: envs.World):
        count = world.objects * world.size**2
        super().__init__(count, c.dim, mode="sum")
        nn.init.normal_(self.weight, std=(c.init_scale / count) ** 0.5)
        self.register_buffer("first_row", torch.arange(world.objects) * world.size**2, persistent=False)

    def forward(self, cells):
        """Cells of all objects (B, T, O + W + 1) -> (B, T, D)."""
        return super().forward((cells + self.first_row).flatten(0, -2)).unflatten(0, cells.shape[:-1])


class RelativeCells(nn.Module):
    """Departure: where things lie as seen from the agent. It says the same as `AbsoluteCells`, and is learned many
    times faster. An observation becomes the sum of

        features(offset) @ matrix(colour) + obstacle(offset)     for each colour: they share what offsets mean
        obstacle(offset)                                         for each wall: all walls are alike
        agent(cell)                                              for the agent"""

    FEATURES = 24

    def __init__(self, world: envs.World, dim: int):
        super().__init__()
        self.size, offsets = world.size, (2 * world.size - 1) ** 2
        self.features = nn.Parameter(0.5 * torch.randn(offsets, self.FEATURES))
        self.colour = nn.Parameter(torch.randn(world.colours, self.FEATURES, dim) * self.FEATURES**-0.5)
        self.obstacle = nn.Parameter(0.1 * torch.randn(offsets, dim))
        self.agent = nn.Parameter(0.1 * torch.randn(world.size**2, dim))
        # The table below holds one part for each colour, one for walls, one for the agent.
        part = torch.tensor([*range(world.colours), *[world.colours] * world.walls, world.colours + 1])
        self.register_buffer("first_row", part * offsets, persistent=False)

    def forward(self, cells):
        """Cells of all objects (B, T, O + W + 1) -> (B, T, D)."""
        G = self.size
        place = torch.stack([cells // G, cells % G])  # row and column
        row_offset, column_offset = place[..., :-1] - place[..., -1:] + G - 1  # from the agent: 0 .. 2 G - 2
        offset = row_offset * (2 * G - 1) + column_offset
        index = torch.cat([offset, cells[..., -1:]], dim=-1) + self.first_row
        colours = self.features @ self.colour + self.obstacle  # (O, offsets, D)
        table = torch.cat([colours.flatten(0, 1), self.obstacle, self.agent])
        return F.embedding_bag(index.flatten(0, -2), table, mode="sum").unflatten(0, cells.shape[:-1])


class RelativeAnt(nn.Module):
    """Departure: cells as on the grid, and the body in its own frame (`AntWorld.own_frame`).

    The body has a quarter of the width to itself: added to the cells, it would drown them. The colour that the ant
    stands on has an eighth, because the metacontroller must find visits among all that the residual says."""

    def __init__(self, c: Config, world: envs.AntWorld):
        super().__init__()
        self.world, body, under = world, c.dim // 4, c.dim // 8
        self.cells = RelativeCells(world, c.dim - body - under)
        self.under = nn.Parameter(3 * torch.randn(world.colours, under))
        self.body = nn.Linear(world.BODY, body)

    def forward(self, obs):
        """Observations (B, T, F) -> (B, T, D)."""
        cells, body = (torch.from_numpy(x).to(obs.device) for x in self.world.own_frame(obs.cpu().numpy()))
        stands_on = (cells[..., : len(self.under)] == cells[..., -1:]).to(obs.dtype)  # (B, T, O)
        return torch.cat([self.cells(cells), stands_on @ self.under, self.body(body.to(obs.dtype))], dim=-1)


def normal(mean, std):
    """Gaussian with a diagonal covariance over the last dimension."""
    return Independent(Normal(mean, std, validate_args=False), 1)


class GridHead(nn.Module):
    """Features (..., D) -> distribution of the next move (...), and a guess of the agent's next cell."""

    def __init__(self, c: Config, world: envs.World):
        super().__init__()
        self.logits, self.next = nn.Linear(c.dim, 4), nn.Linear(c.dim, world.size**2)

    def forward(self, features, temperature: float = 1.0):
        return Categorical(logits=self.logits(features) / temperature, validate_args=False)

    def next_nll(self, features, obs):
        """-ln p(o_t+1) of what moves, features (B, T, D), obs (B, T, F) -> (B, T)."""
        return F.cross_entropy(self.next(features).transpose(1, 2), obs[..., -1], reduction="none")


class AntHead(nn.Module):
    """Features (..., D) -> distribution of the torques (..., 8), of one deviation, and a guess of what comes next."""

    def __init__(self, c: Config, world: envs.World):
        super().__init__()
        self.mean, self.next = nn.Linear(c.dim, 8), nn.Linear(c.dim, world.parts["local"].stop)
        self.log_std = nn.Parameter(torch.full((8,), -1.0))

    def forward(self, features, temperature: float = 1.0):
        return normal(self.mean(features), temperature * self.log_std.exp())

    def next_nll(self, features, obs):
        """Of a Gaussian of standard deviation 1, without its constant."""
        return 0.5 * (self.next(features) - obs).square().sum(-1)


EMBEDDINGS = {  # by World.kind
    "grid": lambda c, world: RelativeCells(world, c.dim) if c.relative_obs else AbsoluteCells(c, world),
    "ant": lambda c, world: RelativeAnt(c, world) if c.relative_obs else nn.Linear(world.parts["local"].stop, c.dim),
}
HEADS = {"grid": GridHead, "ant": AntHead}


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal: a matrix learns as fast in all of its directions.

    torch.optim.Muon does the same in bfloat16, which most laptop processors only emulate: ten times slower there."""

    def __init__(self, parameters, lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)
                wide = x if x.shape[0] <= x.shape[1] else x.T
                wide = wide / wide.norm().clamp_min(1e-7)
                for _ in range(5):  # Newton-Schulz iteration towards the nearest orthogonal matrix
                    gram = wide @ wide.T
                    wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # An orthogonal matrix has small entries; this makes its steps as large as AdamW's.
                size = 0.2 * max(p.shape) ** 0.5
                p.sub_(wide if wide.shape == p.shape else wide.T, alpha=group["lr"] * size)


def pretrain_optimisers(c: Config, base: BaseModel) -> list:
    """AdamW (paper), or Muon for the blocks' matrices and AdamW for the rest."""
    if not c.fast_optimiser:
        return [torch.optim.AdamW(base.parameters(), lr=c.pretrain_lr, weight_decay=WEIGHT_DECAY)]
    matrices = [module.weight for module in base.blocks.modules() if isinstance(module, nn.Linear)]
    rest = [p for p in base.parameters() if not any(p is matrix for matrix in matrices)]
    muon = Muon(matrices, lr=c.pretrain_lr, weight_decay=WEIGHT_DECAY)
    return [muon, torch.optim.AdamW(rest, lr=3 * c.pretrain_lr, weight_decay=WEIGHT_DECAY)]


def rate(c: Config, progress: float) -> float:
    """The learning rate, as a share of its peak, after this share (0 to 1) of a phase: it rises in the first fiftieth,
    and falls to 0 in the second half. The paper's is constant."""
    return min(1.0, 0.02 + 49 * progress, 2 - 2 * progress) if c.fast_optimiser else 1.0


def update(model: nn.Module, loss, optimisers: list, share: float) -> None:
    """One gradient step of `model` at this share (0 to 1) of the optimisers' peak rates. Gradients longer than 1 are
    cut to 1. Losses are given per step of an episode: then most gradients are shorter than 1."""
    loss.backward()
    if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
        raise Failure("the gradient is not a finite number; lower the learning rate of this phase", 1)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = share * optimiser.defaults["lr"]
        optimiser.step()
    model.zero_grad(set_to_none=True)


# ----------------------------------------------------------------------------------------------------
# Check: can the frozen base be steered at all? (paper: Fig. 4)
#
# This is not part of the method, as it uses the true subgoals: it trains one controller for each of them, and switches
# them by hand. We call them *labels*. They show soon, and without phase 2, whether a base can be steered at all.
# ----------------------------------------------------------------------------------------------------


class Labels(Controller):
    """One controller per ground-truth subgoal."""

    def __init__(self, c: Config):
        super().__init__(c, len(envs.WORLDS[c.world].subgoals))

    def control(self, residual, subgoal):
        """residual (B, T, D), subgoal (B, T) -> controlled residual (B, T, D)."""
        # Indexing does the same, but sums up its gradient in another order each time, so that runs would differ.
        return self(residual, F.one_hot(subgoal, len(self.out)).to(residual.dtype))


def subgoals(world: envs.World, episodes: envs.Episodes) -> tuple[np.ndarray, np.ndarray]:
    """True subgoal (N, T), -1 in the padding, and where it changes (N, T) bool, never at the first step."""
    subgoal = world.subgoal_of(episodes.goal)
    return subgoal, (np.diff(subgoal, axis=1, prepend=subgoal[:, :1]) != 0) & episodes.mask


def train_labels(run: Run, base: BaseModel) -> Labels:
    """Train ground-truth controllers on the pretraining tasks. The base remembers as much as in phase 3."""
    c = run.config
    rng = run.seeded("steer")
    labels = Labels(c).to(run.device)
    optimiser = torch.optim.AdamW(labels.parameters(), lr=c.discover_lr, weight_decay=WEIGHT_DECAY)
    for step, episodes in zip(range(c.steer_steps), expert_batches(run, rng, c.discover_batch)):
        obs, (subgoal, changed) = run.tensor(episodes.obs[:, :-1]), subgoals(run.world, episodes)
        faded = draw_blind(run, obs, progress=1.0)  # as at the end of phase 2
        residual, _ = base.lower(obs, faded)
        if c.forget:
            faded = faded + forget_at(run.tensor(changed).float())
        features, _ = base.upper(labels.control(residual, run.tensor(np.maximum(subgoal, 0))), faded)
        loss = action_nll(run, base, features, episodes).sum(1).mean()
        update(labels, loss / episodes.lengths.mean(), [optimiser], rate(c, step / c.steer_steps))
        run.log(step + 1, c.steer_steps, "steps", nll=loss.item())
    return labels.requires_grad_(False)


class LabelPilot(Pilot):
    """Ground-truth controllers, switched by hand when the true subgoal changes."""

    def __init__(self, run: Run, B: int, labels: Labels):
        super().__init__(run.config.temperature, run.config.blind == 1, run.config.forget)
        self.run, self.labels = run, labels
        self.subgoal = torch.full((B,), -1, device=run.device)

    def steer(self, residual, batch, rows):
        subgoal = self.run.tensor(batch.subgoal())
        self.opened = subgoal != self.subgoal[rows]
        self.subgoal[rows] = subgoal
        return self.labels.control(residual[:, None], subgoal[:, None])[:, 0]


# ----------------------------------------------------------------------------------------------------
# The baseline: RL on raw actions, by the same loop (paper: App. C.5)
# ----------------------------------------------------------------------------------------------------


def play_actions(run: Run, model: BaseModel, count: int, rng, failures=16, temperature=1.0) -> tuple[Decisions, float]:
    """Raw-action RL plays `count` episodes -> decisions, which are actions, and success.

    It learns from all successes and some `failures`, drawn at random, because episodes are long. The gradient is
    that of the whole batch on average, up to a factor."""
    batch, _ = rollout(run, model, Pilot(temperature), run.world.batch(count, rng))
    kept = batch.reward > 0
    failed = torch.nonzero(~kept)[:, 0]
    kept[failed[torch.randperm(len(failed), device=failed.device)[:failures]]] = True
    return Decisions(*(part[kept] for part in batch)), batch.reward.mean().item()


def raw_rl(run: Run, base: BaseModel, temperature: float = 1.0) -> BaseModel:
    """The baseline: fine-tune a copy of the base on raw actions, with as many episodes."""
    c = run.config
    model = copy.deepcopy(base).requires_grad_(True)
    play = lambda rng: play_actions(run, model, c.rl_batch, rng, temperature=temperature)
    log_prob = lambda obs, action: model.head(model(obs), temperature).log_prob(action)
    reinforce(run, "raw", model, c.raw_lr, play, log_prob)
    return model.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------
# Measurements
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_base(run: Run, base: BaseModel, models: dict) -> dict:
    """How far the base is from the best possible predictor, whether it gets anywhere alone, how good the expert is."""
    episodes, total, count = run.held_out, 0.0, run.config.eval_episodes
    for part in episodes.chunks():
        total += action_nll(run, base, base(run.tensor(part.obs[:, :-1])), part).sum().item()
    floor, loss = run.world.floor(episodes), total / count
    _, visited = rollout(run, base, Pilot(), run.world.batch(count, run.seeded("evaluate")))
    return {
        **({"base_nats": loss} if floor is None else {"base_excess_nats": loss - floor}),
        "base_reach": float((visited >= 0).any(axis=1).mean()),
        "expert_success": run.world.expert_success(count),
    }


def measure_labels(run: Run, labels: Labels, models: dict) -> dict:
    """Success in the RL task of ground-truth controllers that are switched by hand."""
    batch = run.world.batch(run.config.eval_episodes, run.seeded("evaluate"))
    played, _ = rollout(run, models["pretrain"], LabelPilot(run, len(batch), labels), batch)
    return {"steer_success": played.reward.mean().item()}


def share_of(successes: float, count: int) -> list[float]:
    """A share and its 95 % interval (Wilson's). After 0 successes in N trials the interval ends at 3.8 / N."""
    p, z2 = successes / count, 1.96**2
    middle, half = p + z2 / (2 * count), (z2 * p * (1 - p) / count + (z2 / (2 * count)) ** 2) ** 0.5
    return [p, max(0.0, middle - half) / (1 + z2 / count), (middle + half) / (1 + z2 / count)]


def share_near(marks: np.ndarray, others: np.ndarray, tolerance: int) -> float:
    """Share of `marks` (N, T) with one of `others` at most `tolerance` steps away; 0 where there are none."""
    wide = np.pad(others, ((0, 0), (tolerance, tolerance)))
    near = np.lib.stride_tricks.sliding_window_view(wide, 2 * tolerance + 1, axis=1).any(axis=-1)
    return float((marks & near).sum() / max(1, marks.sum()))


@torch.no_grad()
def encode(run: Run, base: BaseModel, meta: Metacontroller, episodes: envs.Episodes, rng):
    """Codes (N, T, Z), adopted where the gate (N, T) is above the threshold, KL of the proposals (N, T), and loss of
    the base that they steer (N, T)."""
    found = []
    for part in episodes.chunks():
        obs = run.tensor(part.obs[:, :-1])
        faded = each_alone(obs) if run.config.blind == 1 else None  # as in phase 3
        residual, _ = base.lower(obs, faded)
        proposal, kl = propose(run, base, meta, part, rng)
        code, gate = meta.integrate(residual, proposal, meta.threshold)
        if run.config.forget and faded is None:  # a blind base has nothing to forget
            faded = forget_at((gate > meta.threshold).float())
        features, _ = base.upper(meta.control(residual, code), faded)
        found.append((code, gate, kl, action_nll(run, base, features, part)))
    return [torch.cat(column) for column in zip(*found)]


def measure_gate(run: Run, opened, changed, mask, rng) -> dict:
    """Openings of the gate against true changes of subgoal, three (N, T) bool, both without the first step. Beside it
    stands a gate that opens at random, equally often."""
    opened, later, tolerance = opened.copy(), mask.copy(), run.world.tolerance
    opened[:, 0] = later[:, 0] = False
    random = (rng.random(later.shape) < opened.sum() / later.sum()) & later
    return {
        "switch_precision": share_near(opened, changed, tolerance),
        "switch_recall": share_near(changed, opened, tolerance),
        "random_switch_precision": share_near(random, changed, tolerance),
        "random_switch_recall": share_near(changed, random, tolerance),
        "switches_per_episode": float(opened.sum() / len(opened)),
        "true_changes_per_episode": float(changed.sum() / len(changed)),
    }


def mean_codes(run: Run):
    """The mean code of each true subgoal in expert episodes, as `measure_codes` saved them: (subgoals, Z)."""
    return torch.tensor(run.saved["discover"]["metrics"]["mean_codes"], device=run.device)


def random_codes(run: Run):
    """Chooses codes from their prior, N(0, I), for a `CodePilot`."""
    return lambda residual, rows: torch.randn(len(rows), run.config.code_dim, device=run.device)


def measure_random_codes(run: Run, base: BaseModel, meta: Metacontroller, rng) -> dict:
    """What random codes achieve: which subgoal follows which, and success in the RL task."""
    world, count, codes = run.world, run.config.eval_episodes, random_codes(run)
    play = lambda n, roam: rollout(run, base, CodePilot(run, n, meta, codes), world.batch(n, rng, roam))
    (_, visited), (trials, _) = play(count, roam=True), play(4 * count, roam=False)
    counts = transition_counts(world, visited)
    unseen = [counts[a, b] / max(counts[a].sum(), 1) for a, b in world.transitions(world.rl_task)]
    return {
        "unseen_transition_probability": float(np.mean(unseen)),
        "random_code_success": trials.reward.mean().item(),
        "counting_success": world.counting_success,
    }


def measure_codes(run: Run, meta: Metacontroller, models: dict) -> dict:
    """When the gate opens, what the codes mean there, and what random codes achieve."""
    base, rng, episodes = models["pretrain"], run.seeded("evaluate"), run.held_out
    subgoal, changed = subgoals(run.world, episodes)
    code, gate, kl, nll = encode(run, base, meta, episodes, rng)
    opened = (gate > meta.threshold).cpu().numpy() & episodes.mask
    about_gate = measure_gate(run, opened, changed, episodes.mask, rng)
    about_random_codes = measure_random_codes(run, base, meta, rng)
    for i, steps in enumerate(episodes.lengths[:3]):
        print("true subgoal  " + "".join(str(k) for k in subgoal[i, :steps]))
        print("gate opens    " + "".join("|" if now else "." for now in opened[i, :steps]))
    opened, subgoal = run.tensor(opened), run.tensor(subgoal)
    named = [code[opened & (subgoal == k)] for k in range(len(run.world.subgoals))]
    return {
        **about_gate,
        "steered_nats": nll.sum(1).mean().item(),
        "kl_nats": kl.sum(1).mean().item(),
        "kl_per_switch_nats": (kl * opened).sum().item() / opened.sum().item(),
        "code_accuracy": fit_readout(run, code[opened], subgoal[opened]),
        **about_random_codes,
        "mean_codes": [part.mean(0).nan_to_num().tolist() for part in named],  # of each true subgoal
    }


def transition_counts(world: envs.World, visited: np.ndarray) -> np.ndarray:
    """How often subgoal b was completed next after subgoal a, in roaming episodes: (subgoals, subgoals + 1).

    visited (N, T) holds the colour visited by each step or -1. A subgoal is completed when its colours are visited
    one after the other; the last column counts what completes none."""
    n, length = len(world.subgoals), len(world.subgoals[0])
    number = {colours: k for k, colours in enumerate(world.subgoals)}
    counts = np.zeros((n + 1, n + 1))  # the last row and column: of what is no subgoal
    for row in visited:
        sequence = row[row >= 0]
        done = [number.get(tuple(sequence[i : i + length]), n) for i in range(len(sequence) - length + 1)]
        for a, b in zip(done, done[length:]):
            counts[a, b] += 1
    return counts[:n]


def fit_readout(run: Run, inputs, labels, hidden: int = 64) -> float:
    """Held-out accuracy of a small MLP's read-out (hidden 0: a linear one); the second half is held out.

    inputs (N, F), labels (N,), in the order of their episodes, so that the halves share at most one."""
    half = len(inputs) // 2
    torch.manual_seed(0)
    inputs = (inputs - inputs[:half].mean(0)) / (inputs[:half].std(0) + 1e-6)
    width, classes = inputs.shape[1], int(labels.max()) + 1
    first = [nn.Linear(width, hidden), nn.ReLU()] if hidden else []
    net = nn.Sequential(*first, nn.Linear(hidden or width, classes)).to(run.device)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(300):
        loss = F.cross_entropy(net(inputs[:half]), labels[:half])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (net(inputs[half:]).argmax(-1) == labels[half:]).float().mean().item()


def measure_policy(run: Run, policy: Policy, models: dict) -> dict:
    """Success in the RL task of the policy, sampled and with its mean codes, on fresh episodes."""
    base, meta, count = models["pretrain"], models["discover"], 4 * run.config.eval_episodes
    _, success = play_codes(run, base, meta, policy, count, run.seeded("evaluate"))
    _, mean_success = play_codes(run, base, meta, policy, count, run.seeded("evaluate"), sample=False)
    return {"internal_rl_success": success, "internal_rl_mean_success": mean_success, "rl_curve": run.curves["rl"]}


def measure_raw(run: Run, model: BaseModel, models: dict) -> dict:
    """Success in the RL task of the fine-tuned base on fresh episodes."""
    _, success = play_actions(run, model, 4 * run.config.eval_episodes, run.seeded("evaluate"))
    return {"raw_rl_success": success, "raw_curve": run.curves["raw"]}


# ----------------------------------------------------------------------------------------------------
# The paper's other claims (--phase claims)
#
# In: the models of a finished run. Out: for each claim what we measured, and whether it holds here. The last line of
# each function is the rule for that. The method needs none of this. The last two claims need other training, too: they
# get the (config, metrics) of the finished runs and of the runs below the folder `--runs`.
# ----------------------------------------------------------------------------------------------------


def claim_belief(run: Run, models: dict):
    """The subgoal can be read off the residual stream linearly, from mid-depth on better than at the input (Fig. 3).
    Blind: what a step alone tells. The read-out learns from the first half of the held-out episodes."""
    episodes, base = run.held_out, copy.copy(models["pretrain"])
    subgoal = run.tensor(subgoals(run.world, episodes)[0][episodes.mask])
    parts = [(run.tensor(part.obs[:, :-1]), run.tensor(part.mask)) for part in episodes.chunks()]
    residuals = lambda lower: torch.cat([lower(obs)[0][mask] for obs, mask in parts])
    accuracy = lambda lower: fit_readout(run, residuals(lower), subgoal, hidden=0)
    seen, blind = [], []
    for block in range(len(base.blocks) + 1):
        base.control_block = block  # `lower` ends there
        seen.append(accuracy(base.lower))
        blind.append(accuracy(lambda obs: base.lower(obs, each_alone(obs))))
    later_half = seen[1 + len(base.blocks) // 2 :]
    return {"all steps so far": seen, "blind": blind}, min(later_half) > max(seen[0], *blind) + 0.05


def claim_depth(run: Run, models: dict):
    """Controllers of true subgoals steer best near the middle (Fig. 4): labels after each block, trained alike."""
    base, success = copy.copy(models["pretrain"]), []
    for block in range(len(base.blocks) + 1):
        base.control_block = block
        success.append(measure_labels(run, train_labels(run, base), {"pretrain": base})["steer_success"])
    return {"success of labels": success}, max(success[1:-1]) > max(success[0], success[-1]) + 0.05


def claim_gate(run: Run, models: dict):
    """The gate opens where the subgoal changes (Figs. 6, A3). Beside it a rule: open after each visit to a colour. It
    is right by construction where each subgoal is one colour."""
    metrics, episodes, near = run.saved["discover"]["metrics"], run.held_out, run.world.tolerance
    changed = subgoals(run.world, episodes)[1]
    visit = (np.diff(episodes.goal, axis=1, prepend=episodes.goal[:, :1]) != 0) & episodes.mask
    found = {f"{what}, gate": metrics[f"switch_{what}"] for what in ("precision", "recall")}
    rule = {"precision, rule": share_near(visit, changed, near), "recall, rule": share_near(changed, visit, near)}
    return found | rule, min(found.values()) > 0.95


def unseen_share(world: envs.World, visited) -> list[float]:
    """How often a transition of the RL task is made where it could be, in roaming episodes; visited (N, T)."""
    first_two = (visited >= 0).cumsum(axis=1) <= 2 * len(world.subgoals[0])  # one trial per episode, if it has two
    counts, unseen = transition_counts(world, np.where(first_two, visited, -1)), world.transitions(world.rl_task)
    return share_of(sum(counts[pair] for pair in unseen), sum(counts[a].sum() for a in {a for a, _ in unseen}))


def two_codes(run: Run, meta: Metacontroller, first, second, step: int = 0) -> CodePilot:
    """Steers by the codes `first` (B, Z), from the next opening of the gate on by `second`. At `step` we open it."""
    pilot = CodePilot(run, len(first), meta, lambda residual, rows: (second if pilot.step else first)[rows])
    pilot.forced = {0, step}
    return pilot


def claim_goal(run: Run, models: dict):
    """A code is a goal, whatever came before (App. B.3.2). Each agent gets the mean code of one subgoal, then that of
    another (or a random one): half a leg after its start, or on arrival, as in the unseen transitions of RL. Holds
    if the codes win in most episodes, and by .05."""
    base, meta = models["pretrain"], models["discover"]
    rng, count = run.seeded("claims"), 4 * run.config.eval_episodes
    world, codes = run.world, mean_codes(run)
    roam = lambda pilot: rollout(run, base, pilot, world.batch(count, rng, roam=True))[1]
    found, goal = {}, run.held_out.goal
    half = round((goal >= 0).sum() / (np.diff(goal, append=-1) != 0).sum() / 2)
    pairs = np.argwhere(~np.eye(len(codes), dtype=bool))  # all pairs of different subgoals
    for name in ("kept", "replaced by a random one", "replaced"):
        first, second = rng.choice(pairs, count).T
        new = codes[first if name == "kept" else second]
        if name == "replaced by a random one":
            new = torch.randn_like(new)
        visited = roam(two_codes(run, meta, codes[first], new, half))
        late = (visited[:, :half] < 0).all(axis=1)  # no visit before the code was replaced
        arrived = visited[np.arange(count), (visited >= 0).argmax(axis=1)] == np.array(world.subgoals)[second, 0]
        found[f"its colour is next, code {name}"] = share_of(arrived[late].sum(), late.sum())
    found["unseen transition, base alone"] = unseen_share(world, roam(Pilot(run.config.temperature)))
    first, second = rng.choice(sorted(world.transitions(world.rl_task)), count).T
    found["unseen transition, codes"] = unseen_share(world, roam(two_codes(run, meta, codes[first], codes[second])))
    kept, by_chance, replaced, alone, coded = (share for share, *_ in found.values())
    return found, min(replaced, coded) > 0.5 and replaced > max(kept, by_chance) + 0.05 and coded > alone + 0.05


def right_visits(world: envs.World, visited) -> np.ndarray:
    """How many episodes make the first visit of the RL task, the second, ...; a wrong one ends an episode."""
    number = (visited >= 0).cumsum(axis=1) - 1  # of the latest visit, (N, T)
    right = (visited >= 0) & (visited == np.array(world.rl_task)[number])
    return np.bincount(number[right], minlength=len(world.rl_task))


def claim_explore(run: Run, models: dict):
    """Before anything is learned, random codes succeed more often than the base that RL on raw actions starts from
    (Fig. A5): by more than twice the deviation of the difference. Beside them stand random moves: the base at a
    temperature of a million."""
    c, rng = run.config, run.seeded("claims")
    meta, restless = models["discover"], copy.copy(models["discover"])
    restless.force_open = True
    colder = "" if c.temperature == 1 else f", temperature {c.temperature}"  # at 1 the base has one entry
    pilots = {
        "random codes": lambda: CodePilot(run, c.rl_batch, meta, random_codes(run)),
        "random codes, gate forced open": lambda: CodePilot(run, c.rl_batch, restless, random_codes(run)),
        "the base alone": Pilot,
        f"the base alone{colder}": lambda: Pilot(c.temperature),
        "random moves": lambda: Pilot(1e6),
    }
    play = lambda pilot: rollout(run, models["pretrain"], pilot, run.world.batch(c.rl_batch, rng))[1]
    found, episodes = {}, 100 * c.rl_batch
    for name, pilot in pilots.items():
        reached = sum(right_visits(run.world, play(pilot())) for _ in range(100))
        found[name] = {"solved": share_of(reached[-1], episodes), "by visit": (reached / episodes).tolist()}
    codes, _, *alone, _ = (part["solved"][0] * episodes for part in found.values())
    return found, all(codes - other > 2 * (codes + other) ** 0.5 for other in alone)


def imitate(run: Run, model: BaseModel, rng, enough) -> None:
    """Train on experts of the RL task until enough() is true."""
    experts, optimiser = copy.copy(run), torch.optim.AdamW(model.parameters(), lr=1e-3)
    experts.world = replace(run.world, pretrain_tasks=(run.world.rl_task,))
    for step, episodes in zip(range(2000), expert_batches(experts, rng, run.config.discover_batch)):
        if step % 10 == 0 and enough():
            return
        update(model, pretrain_loss(experts, model, episodes)[0] / episodes.lengths.mean(), [optimiser], 1.0)


def gradient_signal(model: nn.Module, play, log_prob, clip: float, batches: int = 128) -> dict:
    """The policy gradient of a model in small batches: squared length of its mean, divided by the variance of a
    batch's gradient, summed over parameters. Beside it the success and the decisions of an episode."""
    total = squares = success = decisions = 0.0
    for _ in range(batches):
        batch, solved = play()
        new = log_prob(batch.inputs, batch.chosen)
        loss = policy_loss(new, batch.log_prob, terminal_advantage(batch.reward), batch.mask, clip)
        parts = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        gradient = torch.cat([part.flatten() for part in parts if part is not None])
        total, squares = total + gradient, squares + gradient.square().sum()
        success, decisions = success + solved / batches, decisions + batch.mask.sum(1).mean().item() / batches
    variance = (squares - total.square().sum() / batches) / (batches - 1)
    signal = (total / batches).square().sum() - variance / batches  # without what chance adds to it
    return {"signal": (signal / variance).item(), "success": success, "decisions": decisions}


def claim_credit(run: Run, models: dict):
    """The policy gradient over codes is less noisy than that over actions, at about equal success (App. E.2). A policy
    over codes learns by RL until it solves .3 of a batch. A copy of the base imitates experts of the RL task until it
    does, too."""
    c, base, meta, rng = run.config, models["pretrain"], models["discover"], run.seeded("claims")
    policy, model = Policy(c).to(run.device), copy.deepcopy(base).requires_grad_(True)
    code_prob = lambda residual, code: policy(residual)[0].log_prob(code)
    move_prob = lambda obs, action: model.head(model(obs)).log_prob(action)
    by_codes = lambda rng, count=c.rl_batch: play_codes(run, base, meta, policy, count, rng)
    by_moves = lambda count: play_actions(run, model, count, rng, failures=count)
    reinforce(run, "rl", policy, c.rl_lr, by_codes, code_prob, enough=0.3)
    imitate(run, model, rng, enough=lambda: by_moves(c.rl_batch)[1] >= 0.3)
    found = {}
    for _ in range(4):  # four times, to see what chance does
        codes = gradient_signal(policy, lambda: by_codes(rng, 64), code_prob, c.rl_clip)
        moves = gradient_signal(model, lambda: by_moves(64), move_prob, c.rl_clip)
        for name, part in (("codes", codes), ("moves", moves)):
            for key, value in part.items():
                found.setdefault(f"{key}, {name}", []).append(value)
    success = [*found["success, codes"], *found["success, moves"]]
    equal = min(success) > 0.2 and max(success) - min(success) < 0.15
    return found, equal and min(found["signal, codes"]) > max(found["signal, moves"])


def claim_raw(run: Run, models: dict):
    """RL on raw actions fails (Figs. 8, A5), also with ten times the episodes, at the temperature of internal RL."""
    c, long = run.config, copy.copy(run)
    long.config = replace(c, rl_episodes=10 * c.rl_episodes)
    raw_rl(long, models["pretrain"], c.temperature)
    episodes, success = zip(*long.curves["raw"])
    found = {"solved in training": share_of(sum(success) * c.rl_batch, episodes[-1])}
    return found, found["solved in training"][2] < 0.001


def control_kind(c: dict, ours: Config) -> str:
    """Which control experiment a run is, from its config. A run of the method as it is, is "frozen"."""
    kind = "gate forced open" if c["force_open"] else "co-trained" if c["cotrain"] else "frozen"
    changed = [f"{name} {c[name]:g}" for name in ("blind", "free_codes") if c[name] != getattr(ours, name)]
    return ", ".join([kind, *changed])


def claim_controls(ours: Config, runs: list):
    """Internal RL fails without temporal abstraction, and where base and metacontroller learned jointly (Fig. 8)."""
    found = {"frozen": [], "gate forced open": [], "co-trained": []}
    for c, m in runs:
        like_ours = c["kl_weight"] == ours.kl_weight and c["discover_steps"] == ours.discover_steps
        if "internal_rl_success" in m and like_ours:
            found.setdefault(control_kind(c, ours), []).append(m["internal_rl_success"])
    fails = lambda name: bool(found[name]) and max(found[name]) < 0.05
    works = bool(found["frozen"]) and min(found["frozen"]) > 0.5
    return found, works and fails("gate forced open") and fails("co-trained")


def claim_rate(ours: Config, runs: list):
    """Freezing is essential (Fig. 7): at some price of the code most runs switch where the subgoal changes on a frozen
    base, at none on one that learned jointly. A run: [steps, price, KL, loss, openings, 1 if P and R > .95]."""
    found = {"frozen": [], "co-trained": []}
    for c, m in runs:
        if "kl_nats" in m and not c["force_open"]:
            aligned = float(min(m["switch_precision"], m["switch_recall"]) > 0.95)
            measured = m["kl_nats"], m["steered_nats"], m["switches_per_episode"], aligned
            kind = found.setdefault(control_kind(c, ours), [])
            kind.append([c["discover_steps"], c["kl_weight"], *measured])
    # For each run: of all runs with as many steps and the same price, the share that is aligned.
    shares = lambda rows: [np.mean([row[-1] for row in rows if row[:2] == one[:2]]) for one in rows]
    most = {name: max(shares(rows), default=math.nan) for name, rows in found.items()}
    return found, most["frozen"] >= 0.5 > most["co-trained"]


CLAIMS = {  # (run, models) -> numbers, whether it holds
    "belief": claim_belief, "depth": claim_depth, "gate": claim_gate, "goal": claim_goal, "explore": claim_explore,
    "credit": claim_credit, "raw": claim_raw,
}  # fmt: skip
CONTROLS = {"controls": claim_controls, "rate": claim_rate}  # (config, all runs) -> numbers, whether it holds


# ----------------------------------------------------------------------------------------------------
# Figures (matplotlib is imported here only)
# ----------------------------------------------------------------------------------------------------


def new_figure(**options):
    """An empty figure. It is drawn without a screen, and goes when nothing refers to it: no pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Failure("pictures need matplotlib: pip install matplotlib (or pass --no-figures, or no --gif)") from None
    return Figure(layout="constrained", **options)


def draw_cells(axis, world: envs.World, obs) -> None:
    """The cells of an observation (F,): colours with their numbers, and walls."""
    places = world.places(obs)[:-1] - 0.5
    content = np.full((world.size, world.size), -1)
    content[tuple(places.round().astype(int).T[::-1])] = np.arange(len(places))
    edges = (-0.5, world.size - 0.5, world.size - 0.5, -0.5)
    axis.imshow(envs.cell_picture(world, content.reshape(-1), 8), extent=edges)
    for colour, (x, y) in enumerate(places[: world.colours]):
        axis.text(x - 0.4, y - 0.2, str(colour), fontweight="bold")
    axis.set(xticks=[], yticks=[], xlim=edges[:2], ylim=edges[2:])


def code_colours(world: envs.World) -> np.ndarray:
    """The colour of the first cell of each subgoal, (subgoals, 3)."""
    return envs.COLOURS[[goal[0] % len(envs.COLOURS) for goal in world.subgoals]] / 255


def draw_gates(axis, run: Run, models: dict) -> None:
    """The gate over time on three held-out episodes; the shades are the true subgoals."""
    episodes, colours = run.held_out.take(np.arange(3)), code_colours(run.world)
    subgoal, changed = subgoals(run.world, episodes)
    gate = encode(run, models["pretrain"], models["discover"], episodes, run.seeded("figures"))[1].cpu().numpy()
    for i, steps in enumerate(episodes.lengths):
        axis.bar(np.arange(steps), 1, 1, -1.3 * i, color=colours[subgoal[i, :steps]], alpha=0.4)
        axis.bar(np.arange(steps), gate[i, :steps], 0.3, -1.3 * i, color="black")
        for t in [0, *np.flatnonzero(changed[i])]:
            axis.text(t - 0.4, 1.03 - 1.3 * i, str(subgoal[i, t]), fontsize=8)
    axis.set(yticks=[], xlabel="step", title="gate (bars) over true subgoal (shade, number), three expert episodes")


def draw_code(axis, run: Run, models: dict, number: int, code) -> None:
    """Where 100 agents are after their first visit, under one code that is held; they start all over one layout."""
    rng = run.seeded("figures")
    pilot = CodePilot(run, 100, models["discover"], lambda residual, rows: code)
    played, visited = rollout(run, models["pretrain"], pilot, run.world.scattered(100, rng))
    obs, last = played.inputs.cpu().numpy(), played.mask.sum(1).int().cpu().numpy() - 1
    seen, rows = visited >= 0, np.arange(100)
    first = seen.argmax(axis=1)
    end = np.where(seen.any(axis=1), np.minimum(first + 1, last), last)
    x, y = run.world.places(obs[rows, end])[:, -1].T - 0.5 + rng.uniform(-0.2, 0.2, (2, 100))
    goal = run.world.subgoals[number][0]
    draw_cells(axis, run.world, obs[0, 0])
    axis.plot(x, y, "k.", alpha=0.4)
    share = np.mean(visited[rows, first] == goal)
    axis.set_title(f"code {number}: {share:.0%} visit {goal} first", fontsize=10)


def draw_curves(axis, seeds: list[dict]) -> None:
    """Success of each training batch against episodes, a line for each seed; random codes and the expert beside."""
    for name, key, style in (("internal RL", "rl_curve", "C0-"), ("raw-action RL", "raw_curve", "C3--")):
        for i, points in enumerate(metrics[key] for metrics in seeds if metrics.get(key)):
            axis.plot(*zip(*points), style, label=None if i else name)
    for name, key, style in (("the expert", "expert_success", ":"), ("random codes", "random_code_success", "-.")):
        axis.axhline(seeds[0][key], color="grey", linestyle=style, label=name)
    axis.set(xlabel="episodes", ylabel="success", ylim=(-0.03, 1.03), title="RL from one reward at the end")
    axis.legend(loc="center left", fontsize=8)


def draw_picture(run: Run, models: dict, seeds: list[dict], path: Path) -> None:
    """The paper in one picture: when the gate opens, what the codes do, how fast a policy over them learns."""
    codes = mean_codes(run)
    layout = [["gates"] * len(codes), [*range(len(codes))], ["curves"] * len(codes)]
    figure = new_figure(figsize=(9, 9))
    axes = figure.subplot_mosaic(layout, height_ratios=(2, 3, 3))
    draw_gates(axes["gates"], run, models)
    for number, code in enumerate(codes):
        draw_code(axes[number], run, models, number, code)
    draw_curves(axes["curves"], seeds)
    write_whole(path, lambda file: figure.savefig(file, dpi=110))


LINES = {"belief": "after block", "depth": "after block", "explore": "visit"}  # claims drawn as lines, over what


def draw_claim(axis, name: str, numbers: dict, labelled: bool) -> None:
    """The numbers of one seed, or of all control experiments; marks and lines differ, to be read in grey."""
    for row, (label, value) in enumerate(numbers.items()):
        style, label = ("ko-", "ks--", "k^:", "kD-.", "kv-", "kP--")[row % 6], label if labelled else None
        if name == "explore":
            axis.semilogy(range(1, len(value["by visit"]) + 1), value["by visit"], style, label=label)
        elif name in LINES:
            axis.plot(value, style, label=label)
        elif name == "rate":
            for _, _, kl, nats, _, aligned in value:
                axis.plot(kl, nats, style[:2], fillstyle="full" if aligned else "none")
            axis.plot([], [], style[:2], label=label)
        else:  # a row for each number, with its interval
            axis.plot(value, np.full(np.size(value), row), "ko-")
            axis.text(0.02, row + 0.25, label or "", fontsize=8, transform=axis.get_yaxis_transform())
    if name == "explore":
        axis.set_ylim(1e-6, 1e3)  # with room for the legend
    if name in LINES:
        axis.set_xlabel(LINES[name])
        axis.legend(fontsize=7)
        axis.xaxis.get_major_locator().set_params(integer=True)
    elif name == "rate":
        axis.set(xscale="log", xlim=(1e-9, 1e3), xlabel="KL; above: loss; filled: aligned")  # with room for the legend
        axis.legend(fontsize=7, loc="center left")
    else:
        axis.set(yticks=[], ylim=(-0.5, len(numbers)), xscale="log" if name == "credit" else "linear")


def draw_claims(seeds: list[dict], controls: dict, path: Path) -> None:
    """A panel for each claim, with all seeds, and one for each claim on control experiments."""
    found = {name: [seed["claims"][name] for seed in seeds] for name in CLAIMS}
    found |= {name: [part] for name, part in controls.items()}
    rows = math.ceil(len(found) / 3)
    figure = new_figure(figsize=(13, 3.4 * rows))
    for place, (name, parts) in enumerate(found.items(), 1):
        axis = figure.add_subplot(rows, 3, place)
        holds = f"holds on {sum(part['holds'] for part in parts)} of {len(parts)} seeds"
        of_one = "holds" if parts[0]["holds"] else "does not hold"
        axis.set_title(f"{name}: {holds if name in CLAIMS else of_one}", fontsize=10)
        for part in parts:
            draw_claim(axis, name, part["numbers"], labelled=part is parts[0])
    write_whole(path, lambda file: figure.savefig(file, dpi=110))


def draw_animation(run: Run, episodes: list[list[tuple]], path: Path, fps: float) -> None:
    """What was watched, animated: the path has the colour of its code, dots are switches, the gate is below."""
    from matplotlib.animation import PillowWriter

    figure = new_figure(figsize=(3, 3.4))
    axis, below = figure.subplots(2, 1, height_ratios=(12, 1))
    colours, writer = 0.7 * code_colours(run.world), PillowWriter(fps=fps)
    bar = below.barh(0, 1, color="black")[0]
    below.set(xlim=(0, 1), yticks=[], xticks=[], xlabel="gate")
    with writer.saving(figure, path, dpi=80):
        for frames in episodes:
            axis.clear()
            draw_cells(axis, run.world, frames[0][0])
            agent = axis.plot([], [], "ks", markersize=9, zorder=3)[0]
            x, y = run.world.places(np.stack([obs for obs, *_ in frames]))[:, -1].T - 0.5
            for t, (_, number, gate, opened) in enumerate(frames):
                if opened:
                    axis.plot(x[t], y[t], "o", color=colours[number])
                agent.set_data(x[t : t + 1], y[t : t + 1])
                bar.set_width(gate)
                if t % run.world.shown_every == 0 or t == len(frames) - 1:
                    writer.grab_frame()
                axis.plot(x[t : t + 2], y[t : t + 2], color=colours[number])


# ----------------------------------------------------------------------------------------------------
# Watching: a trained run plays, by its policy, under one code, or by hand (--phase watch)
# ----------------------------------------------------------------------------------------------------


def ask(codes):
    """The code (1, Z) that the person at the keyboard asks for, by its number among the codes (subgoals, Z)."""
    while True:
        answer = input(f"the gate is open: code 0 to {len(codes) - 1}? ").strip()
        if answer.isdecimal() and int(answer) < len(codes):
            return codes[[int(answer)]]


class Viewer(CodePilot):
    """Shows every `every`-th step of the episode that it steers: cells, task, the code in force, `|` where the gate
    opened. `frames` has an observation, the number of the code, the gate and whether it opened."""

    def __init__(self, run: Run, meta: Metacontroller, choose, codes, fps: float, every: int):
        super().__init__(run, 1, meta, choose)
        self.run, self.codes, self.fps, self.frames = run, codes, fps, []
        self.every = every

    def show(self, batch) -> None:
        world = self.run.world
        marked = " ".join(f"[{c}]" if i == batch.stage[0] else str(c) for i, c in enumerate(world.rl_task))
        task = "" if batch.roam else f", task {marked}"
        print(f"step {len(self.frames)}{task}\n{envs.grid_text(world, batch.content[0], int(batch.cell[0]))}", end="")

    def steer(self, residual, batch, rows):
        t = len(self.frames)
        shown = t % self.every == 0
        if shown:
            self.show(batch)
        controlled = super().steer(residual, batch, rows)
        number, gate = int(torch.cdist(self.code, self.codes).argmin()), self.gate.item() if t else 1.0
        self.frames.append((batch.observe()[0], number, gate, bool(self.opened)))
        if shown:
            print(f"{'|' if self.opened else '.'} code {number}, gate {gate:.2f}\n", flush=True)
            time.sleep(1 / self.fps if self.fps else 0)
        return controlled


def watch(run: Run, args) -> None:
    """Play episodes of the RL task in the terminal; with --gif draw them as well."""
    held = args.code is not None
    needed = TRAINED[:2] if args.by_hand or held else TRAINED  # by number: nobody asks the policy
    path = load_saved(run, "watch", needed)
    models = {name: load_model(run, name) for name in needed}
    codes = mean_codes(run)
    by_number = lambda residual, rows: ask(codes) if args.by_hand else codes[[args.code]]
    rng, episodes, solved, fps = run.seeded("watch"), [], 0, 4 if args.fps is None else args.fps
    print(f"The trained run {path}. Codes are numbered by the true subgoal that they serve, for display only.\n"
          "@ agent, * agent on a colour, # wall, [ ] the next visit (the policy is not told)\n"
          "| the gate opened: a new code; . the code is held. Ctrl-C ends it.\n")  # fmt: skip
    try:
        for number in range(1, (args.watch_episodes or (1 if held else 3)) + 1):
            choose = PolicyCodes(run, 1, models["rl"]) if "rl" in models else by_number
            every = 1 if args.by_hand else run.world.shown_every  # a person must see where the gate opened
            viewer = Viewer(run, models["discover"], choose, codes, fps, every)
            episodes.append(viewer.frames)
            batch = run.world.batch(1, rng, roam=held)  # one code: also after its goal is reached
            played, visited = rollout(run, models["pretrain"], viewer, batch)
            viewer.show(batch)  # where the last step led
            viewer.frames.append((batch.observe()[0], viewer.frames[-1][1], 0.0, False))
            solved += int(played.reward.item())
            visits = "-".join(str(colour) for colour in visited[visited >= 0]) or "none"
            line = f"{visited.size} steps, visits {visits}"
            if not held:
                end = "solved" if played.reward.item() else "not solved"
                line = f"{end}, {line}; solved {solved} of {number}"
            print(f"{number}: {line}\n")
    except (EOFError, KeyboardInterrupt):
        print("\nbye")
    seen = [frames for frames in episodes if frames]
    if args.gif and seen:
        write_whole(Path(args.gif), lambda file: draw_animation(run, seen, file, fps or 4))


# ----------------------------------------------------------------------------------------------------
# Running: stages, what is saved, flags
# ----------------------------------------------------------------------------------------------------


class Failure(Exception):
    """A run that cannot go on: printed as one line. `status` 2 is bad input, 1 a failed run."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


# Offsets that keep random streams apart: a stage depends on (config, seed, the stages that it needs) alone.
STREAMS = dict(pretrain=0, steer=1, discover=2, rl=3, raw=4, evaluate=6, figures=7, watch=8, claims=9)


class Run:
    """What every phase needs besides its inputs: config, seed, device, random streams, log."""

    def __init__(self, config: Config, seed: int, device: torch.device, out: Path | None = None, name=""):
        self.config, self.seed, self.device, self.out = config, seed, device, out
        self.world = replace(envs.WORLDS[config.world], jumps=config.jumps, threads=torch.get_num_threads())
        self.phase, self.started, self.shown = "", time.time(), 0.0
        self.plan = {}  # stages to do, and their typical minutes
        self.curves = {}  # success of each batch of RL, see `reinforce`
        self.name, self.saved = name, {}  # {stage: its config, seed, model and metrics}, see `load_saved`

    def seeded(self, phase: str) -> np.random.Generator:
        """Begin a phase: seed PyTorch for it; returns what numpy's chance comes from, in the worlds."""
        number = 1000 * self.seed + STREAMS[phase]
        torch.manual_seed(number)
        self.phase, self.started, self.shown = phase, time.time(), 0.0
        return np.random.default_rng(number)

    def tensor(self, array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @functools.cached_property
    def held_out(self) -> envs.Episodes:
        """Expert trajectories for evaluation: the same for every seed, never trained on."""
        return self.world.held_out(self.config.eval_episodes)

    def log(self, step: int, total: int, unit: str, **metrics) -> None:
        """Show progress at most every 10 seconds (and at the end) and append it to metrics.csv."""
        elapsed = time.time() - self.started
        if step < total and elapsed - self.shown < 10:
            return
        self.shown = elapsed
        left, stages, whole = elapsed / step * max(0, total - step), [*self.plan], ""
        place = stages.index(self.phase) + 1 if self.phase in stages else 0
        if self.plan.get(self.phase):  # later stages take longer than typical by as much as this one does
            later = sum(self.plan[name] for name in stages[place:]) / self.plan[self.phase]
            whole = f", whole run {(left + later * (elapsed + left)) / 60:.1f} min"
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        speed = f"{step / max(elapsed, 1e-9):,.3g} {unit}/s"
        print(f"{place}/{len(stages)} {self.phase:9s}{step:>8,}/{total:,} {unit}  {values}  {speed}; left: "
              f"phase {left:.0f} s{whole}", flush=True)  # fmt: skip
        if self.out:
            path = self.out / "metrics.csv"
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.writelines(f"{self.phase},{step},{elapsed:.1f},{key},{metrics[key]}\n" for key in metrics)


class Stage(NamedTuple):
    """A part of a run that depends on (config, seed, earlier stages) and is done once."""

    phase: str  # the --phase it belongs to
    needs: tuple[str, ...]  # earlier stages whose models it takes
    last: str  # the last config field it depends on: changing a later one leaves what is saved valid
    train: object  # function (run, *needed models) -> model
    build: object  # config -> untrained model, to load a saved one into
    measure: object  # function (run, model, models so far) -> metrics


STAGES = {
    "pretrain": Stage("pretrain", (), "jumps", pretrain, BaseModel, measure_base),
    "steer": Stage("pretrain", ("pretrain",), "steer_steps", train_labels, Labels, measure_labels),
    "discover": Stage("discover", ("pretrain",), "cotrain", discover, Metacontroller, measure_codes),
    "rl": Stage("rl", ("pretrain", "discover"), "rl_clip", internal_rl, Policy, measure_policy),
    "raw": Stage("rl", ("pretrain",), "raw_lr", raw_rl, BaseModel, measure_raw),
}
TRAINED = "pretrain", "discover", "rl"  # the stages of the method
NORMALISED = "steer_success", "internal_rl_success", "internal_rl_mean_success", "raw_rl_success"
TRIALS = {  # which metrics are shares, and of how many times `eval_episodes`
    "expert_success": 1, "base_reach": 1, "steer_success": 1, "random_code_success": 4, "internal_rl_success": 4,
    "internal_rl_mean_success": 4, "raw_rl_success": 4,
}  # fmt: skip


@contextlib.contextmanager
def writing(path: Path):
    """If the file cannot be written, say so in one line."""
    try:
        yield
    except OSError as error:
        raise Failure(f"{path}: cannot write it ({error.strerror})", 1) from None


def write_whole(path: Path, write) -> None:
    """Write a file whole or not at all; `write` gets the path of a temporary one."""
    temporary = path.with_name("new-" + path.name)
    with writing(path):
        write(temporary)
        os.replace(temporary, path)


def write_json(path: Path, content) -> None:
    write_whole(path, lambda file: file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


SHIPPED = Path(__file__).parent / "results"  # where trained runs lie that come with the code
SHIPPED_SEED = {"ant": 1}  # seed of such a run, and default of --seed. Others: 0. The ant's is the median of three


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failure(f"{path}: not there, or not a file of ours ({type(error).__name__})") from None


def load_saved(run: Run, phase: str, watched=TRAINED) -> Path:
    """Fill `run.saved` with the stages that are done: those in OUT/run.pt. Where that file (or OUT) is missing and
    `phase` needs earlier stages, they are those of the trained run in results/. Returns the file. Writes nothing.
    watched: the stages that `phase` needs if it is "watch" ("claims" needs all three of the method).

    Raises Failure if the file is damaged, belongs to another config or seed, or lacks what `phase` needs."""
    wanted = [name for name, stage in STAGES.items() if phase in ("all", stage.phase)]
    needed = {need for name in wanted for need in STAGES[name].needs} - {*wanted}
    needed = {*watched} if phase in ("watch", "claims") else needed
    mine = (run.out or SHIPPED) / "run.pt"
    own = os.path.exists(mine)  # False for a name that cannot be one, too
    path = SHIPPED / f"{run.name}.pt" if needed and not own else mine
    try:
        saved = torch.load(path, map_location=run.device) if os.path.exists(path) else {}
        if {*saved} - {*STAGES} or any({*part} != {"config", "seed", "model", "metrics"} for part in saved.values()):
            raise KeyError
        run.saved = {name: saved[name] for name in STAGES if name in saved and (own or name in needed)}
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Failure(f"{path}: not a run of ours ({type(error).__name__}); delete it to begin anew") from None
    names, ours = ["seed", *asdict(run.config)], {"seed": run.seed, **asdict(run.config)}
    advice = "choose another --out" if own else "run --phase pretrain here first"
    for name, content in run.saved.items():
        theirs = {"seed": content["seed"], **content["config"]}
        for field in names[: names.index(STAGES[name].last) + 1]:  # a stage depends on no later one
            if theirs.get(field) != ours[field]:
                raise Failure(f"{path}: made with --{field}={theirs.get(field)}, this run has {ours[field]}; {advice}")
    missing = [STAGES[name].phase for name in STAGES if name in needed and name not in run.saved]
    if missing:
        raise Failure(f"--phase {phase}: {mine} is not there or lacks --phase {missing[0]}; run that first")
    typical = SHIPPED / f"{run.name}.json"  # whose minutes tell how long this run may take
    shipped = read_json(typical)["seeds"][0] if typical.exists() else {}
    run.plan = {name: shipped.get(f"minutes_{name}", 0.0) for name in wanted if name not in run.saved}
    return path


def load_model(run: Run, name: str) -> nn.Module:
    """The frozen model of a saved stage."""
    model = STAGES[name].build(run.config).to(run.device)
    model.load_state_dict(run.saved[name]["model"])
    return model.requires_grad_(False)


def single_numbers(metrics: dict) -> dict:
    """The metrics that are one number each: without curves, codes and intervals."""
    return {name: value for name, value in metrics.items() if not isinstance(value, (list, dict))}


def run_stage(run: Run, name: str, models: dict) -> dict:
    """Load the stage if it is finished, else do it and save it. Adds its model to `models`, returns its metrics."""
    if name in run.saved:
        models[name] = load_model(run, name)
        print(f"{name}: done before")
        return run.saved[name]["metrics"]
    stage, started = STAGES[name], time.time()
    forget_metrics(run.out / "metrics.csv", name)
    model = models[name] = stage.train(run, *(models[need] for need in stage.needs))
    minutes = (time.time() - started) / 60
    metrics = {**stage.measure(run, model, models), f"minutes_{name}": minutes}
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in single_numbers(metrics).items()), flush=True)
    if not all(math.isfinite(value) for value in single_numbers(metrics).values()):
        raise Failure(f"{name}: not a finite number: {single_numbers(metrics)}; lower the learning rate", 1)
    plain = json.loads(json.dumps(metrics, default=float))  # no numpy scalars: torch.load refuses them
    run.saved[name] = {"config": asdict(run.config), "seed": run.seed, "metrics": plain, "model": model.state_dict()}
    if run.config.cotrain and name == "discover":
        # The base has changed, too. Its metrics and its labels are still those of the old one.
        run.saved["pretrain"]["model"] = models["pretrain"].state_dict()
    packed = io.BytesIO()  # writing to a disk that is full is an OSError then
    torch.save(run.saved, packed)
    write_whole(run.out / "run.pt", lambda file: file.write_bytes(packed.getvalue()))
    return plain


def forget_metrics(path: Path, phase: str) -> None:
    """Take the rows of a phase that was interrupted out of metrics.csv, as it begins anew."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = "".join(line for line in lines if not line.startswith(phase + ","))
        write_whole(path, lambda file: file.write_text(kept, encoding="utf-8"))


def run_seed(run: Run, phase: str) -> dict:
    """All stages of `phase` for one seed, resuming what is finished; returns the metrics so far."""
    write_json(run.out / "config.json", {"seed": run.seed, **asdict(run.config)})
    models, metrics = {}, {"seed": run.seed}
    for name, stage in STAGES.items():
        if phase in ("all", stage.phase) or name in run.saved:
            metrics |= run_stage(run, name, models)
    expert = max(metrics.get("expert_success", 1.0), 1e-9)
    metrics |= {f"{key}_normalised": metrics[key] / expert for key in NORMALISED if key in metrics}
    trials = {key: times * run.config.eval_episodes for key, times in TRIALS.items() if key in metrics}
    metrics["intervals_95"] = {key: share_of(metrics[key] * n, n)[1:] for key, n in trials.items()}
    metrics["minutes"] = sum(value for name, value in metrics.items() if name.startswith("minutes_"))
    write_json(run.out / "results.json", metrics)
    print("--- results")
    for key, value in single_numbers(metrics).items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    return metrics


def control_runs(folder: Path, config: Config, own=()) -> list[tuple[dict, dict]]:
    """(config, metrics) of all runs below the folder whose other settings are those of this config; own: the folders
    of the finished runs, which are no control experiments."""
    changed = "kl_weight", "force_open", "cotrain", "discover_steps", "blind", "free_codes"  # by control experiments
    ours = {name: value for name, value in asdict(config).items() if name not in changed}
    paths = [path for path in sorted(folder.rglob("results.json")) if path.parent not in own]
    found = [(read_json(path.with_name("config.json")), read_json(path)) for path in paths]
    return [one for one in found if ours.items() <= one[0].items() and {*changed} <= {*one[0]}]


def verdict(name: str, claim, *given) -> dict:
    """Measure a claim: its numbers (plain ones, without numpy's scalars), and whether it holds."""
    print(f"{name}: {claim.__doc__}", flush=True)
    numbers, holds = claim(*given)
    return json.loads(json.dumps({"holds": bool(holds), "numbers": numbers}, default=float))


def check_claims(run: Run, path: Path) -> dict:
    """Measure the claims that `claims.json` of this run does not have yet -> seed, config and claims.
    path: the file of the run."""
    started, quiet = time.time(), copy.copy(run)
    quiet.out = None  # the run's own metrics.csv stays as it is
    print(f"The claims of the paper, on {path}, to {run.out}", flush=True)
    models, file = {name: load_model(run, name) for name in TRAINED}, run.out / "claims.json"
    success = run.saved["rl"]["metrics"]["internal_rl_success"]  # another run has another
    result = {"seed": run.seed, "config": asdict(run.config), "internal_rl_success": success, "claims": {}}
    before = read_json(file)["seeds"][0] if file.exists() else {}
    if {**before, "claims": {}} == result:
        result = before
    for number, (name, claim) in enumerate(CLAIMS.items(), 1):
        if name not in result["claims"]:
            result["claims"][name] = verdict(f"{number}/{len(CLAIMS)} {name}", claim, quiet, models)
            write_json(file, {"seeds": [result]})
        print(f"{name}: {result['claims'][name]}; {(time.time() - started) / 60:.1f} min", flush=True)
    return result


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise Failure(message)


def between(kind, least, most):
    """A parser of numbers from `least` to `most`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # lies between no bounds
        if not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: must be {what} from {least:,} to {most:,}")
        return value

    return parse


def seed_list(text: str) -> list[int]:
    found = [between(int, 0, 999_999)(part) for part in text.split(",")]
    if len({*found}) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: must be different numbers, such as 0,1,2")
    return found


def config_comments() -> dict[str, str]:
    """The comment beside each field of Config is its help text."""
    halves = [line.strip().split("  # ") for line in inspect.getsource(Config).splitlines()]
    return {half[0].split(":")[0]: half[1] for half in halves if len(half) == 2}


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--env", choices=list(PRESETS), default="grid", help="which tasks")
    parser.add_argument("--preset", choices=list(PRESETS["grid"]), default="classroom", help="sizes and schedules")
    phases = ["pretrain", "discover", "rl", "all", "watch", "claims"]
    parser.add_argument("--phase", choices=phases, default="all", help="what to run")
    parser.add_argument("--fast", action="store_true", help="shrink the preset to a smoke run of under a minute")
    parser.add_argument("--seed", type=seed_list, help="seed, or several: 0,1,2 (then all are collected) [0; ant: 1]")
    parser.add_argument("--out", help="folder of results (default: runs/ENV-PRESET, and seed-K in it)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--threads", type=between(int, 0, 256), default=0, help="of the CPU (0: PyTorch's default)")
    parser.add_argument("--no-figures", action="store_true", help="do not draw (matplotlib is not needed then)")
    parser.add_argument("--runs", default="runs/claims", help="with --phase claims: folder of the control experiments")
    group = parser.add_argument_group("with --phase watch, of a trained run")
    group.add_argument("--watch_episodes", type=between(int, 1, 10**6), help="how many [3; one with --code]")
    group.add_argument("--fps", type=between(float, 0, 1000), help="steps shown in a second, 0: no waiting [4]")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--by_hand", action="store_true", default=None, help="you choose the codes, by their numbers")
    either.add_argument("--code", type=between(int, 0, 99), help="this code and no other")
    group.add_argument("--gif", help="also write an animated picture to this file")
    group = parser.add_argument_group("config fields (defaults: preset classroom)")
    comments = config_comments()
    for f in fields(Config):
        kind, text = type(f.default), f"{comments[f.name]} [{f.default}]".replace("%", "%%")
        parse = between(kind, *BOUNDS[f.type]) if f.type in BOUNDS else str.lower if kind is bool else str
        choices = [*CHOICES.get(f.name, CHOICES.get(f.type, ()))] or None  # help shows these, or the kind of number
        group.add_argument(
            f"--{f.name}", type=parse, choices=choices, help=text, metavar=None if choices else kind.__name__.upper()
        )
    return parser


def make_config(args) -> Config:
    if args.preset not in PRESETS[args.env]:
        raise Failure(f"--preset {args.preset}: --env {args.env} has {', '.join(PRESETS[args.env])}")
    given = {f.name: value for f in fields(Config) if (value := getattr(args, f.name)) is not None}
    given |= {name: value == "true" for name, value in given.items() if value in CHOICES["bool"]}
    fast = FAST if args.fast else {}
    config = replace(PRESETS[args.env][args.preset], **{**fast, **given})
    if config.control_block > config.layers:
        raise Failure(f"--control_block={config.control_block}: must be at most --layers={config.layers}")
    if config.dim % Attention.HEADS:
        raise Failure(f"--dim={config.dim}: must be a multiple of {Attention.HEADS}, the number of attention heads")
    world = envs.WORLDS[config.world]
    if world.kind != args.env:
        raise Failure(f"--world={config.world}: not a world of --env {args.env}")
    if not world.transitions(world.rl_task):
        raise Failure(f"--world={config.world}: its rl_task must have at least two subgoals, it is {world.rl_task}")
    return config


def describe_machine() -> str:
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = {package.name: package.version for package in importlib.metadata.distributions()}
    packages = {name: found.get(name, "not installed") for name in ("torch", "numpy", "mujoco", "gymnasium")}
    return {"python": platform.python_version(), **packages}


def main(argv=None) -> int:
    try:
        run_command(make_parser().parse_args(argv), argv)
        return 0
    except Failure as failure:
        print(f"internal_rl: {failure}", file=sys.stderr)
        return failure.status
    except ModuleNotFoundError as error:
        print(f"internal_rl: {error}; install what requirements.txt lists", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("internal_rl: interrupted; the same command resumes after the last finished phase", file=sys.stderr)
        return 130


def run_command(args, argv) -> None:
    config, found = make_config(args), torch.cuda.is_available()
    args.seed = args.seed or [SHIPPED_SEED.get(args.env, 0)]
    if args.device == "cuda" and not found:
        raise Failure("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    device = torch.device("cuda" if args.device != "cpu" and found else "cpu")
    for name in ("watch_episodes", "fps", "by_hand", "code", "gif"):
        if args.phase != "watch" and getattr(args, name) is not None:
            raise Failure(f"--{name}: belongs to --phase watch")
    if args.gif and not (Path(args.gif).suffix == ".gif" and Path(args.gif).parent.is_dir()):
        raise Failure(f"--gif {args.gif}: must end in .gif, in a folder that exists")
    if args.phase == "watch" and len(args.seed) > 1:
        raise Failure(f"--seed {args.seed}: --phase watch shows one")
    if args.code is not None and args.code >= len(envs.WORLDS[config.world].subgoals):
        raise Failure(f"--code {args.code}: there are {len(envs.WORLDS[config.world].subgoals)}, the first is 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # numbers next to zero are slow and mean nothing here
    if args.gif or not (args.no_figures or args.phase == "watch"):
        new_figure()  # says at once if matplotlib is missing
    folder = Path(args.out or f"runs/{args.env}-{args.preset}{'-fast' if args.fast else ''}")
    alone = len(args.seed) == 1 and args.out
    print(f"internal_rl: --env {args.env} --preset {args.preset}; {versions()}; {describe_machine()}; "
          f"{torch.get_num_threads()} threads; {device}; to {folder}")  # fmt: skip
    name = f"{args.env}-{args.preset}"
    runs = [Run(config, seed, device, folder if alone else folder / f"seed-{seed}", name=name) for seed in args.seed]
    if args.phase == "watch":
        return watch(runs[0], args)
    paths = [load_saved(run, args.phase) for run in runs]  # a mismatch must stop us before anything is written
    try:
        for run in runs:
            run.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise Failure(f"--out {folder}: cannot write there ({getattr(error, 'strerror', error)})") from None
    if args.phase == "claims":
        others = control_runs(Path(args.runs), config, [run.out for run in runs])  # first: they may lack something
        seeds = [check_claims(run, path) for run, path in zip(runs, paths)]
        print(f"{len(others)} control experiments below {args.runs}")
        own = [(asdict(config), run.saved["discover"]["metrics"] | run.saved["rl"]["metrics"]) for run in runs]
        controls = {name: verdict(name, claim, config, own + others) for name, claim in CONTROLS.items() if others}
        print(*controls.items(), sep="\n")
        write_json(folder / "claims.json", {"seeds": seeds, "controls": controls})
        if not args.no_figures:
            draw_claims(seeds, controls, folder / "claims.png")
        return
    results = [run_seed(run, args.phase) for run in runs]
    if not args.no_figures and {*TRAINED} <= {*runs[0].saved}:
        models = {stage: load_model(runs[0], stage) for stage in TRAINED}
        draw_picture(runs[0], models, results, (folder if len(runs) > 1 else runs[0].out) / "picture.png")
    if not alone:
        command = "python internal_rl.py " + " ".join(sys.argv[1:] if argv is None else argv)
        summary = {"preset": args.preset, "command": command, "machine": describe_machine(), "versions": versions()}
        kept = [{**single_numbers(metrics), "intervals_95": metrics["intervals_95"]} for metrics in results]
        write_json(folder / f"{name}.json", {**summary, "seeds": kept})


if __name__ == "__main__":
    sys.exit(main())
