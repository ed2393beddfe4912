"""Wiring: every setting of train.Config reaches the place where it acts, and acts there as it says.

RL settings are tested by one rl_step on a tiny model whose answers and plans have known texts. Its optimizer
is plain gradient descent, so that each gradient can be compared with a loop written here. Supervised settings
are tested by runs of one or a few steps from the command line. AdamW's saved state gives the gradient of a
step. test_every_setting_is_covered fails for a setting that is tested neither here nor by a test named in
ELSEWHERE."""

import ast
import dataclasses
import gc
import inspect
import json
import math
import statistics
from pathlib import Path

import oracle
import pytest
import rl
import torch
import train
from data import Tokenizer, encode_all, load
from model import LLaMA
from rl import LogProbs, divergence, rl_step
from safetensors.torch import load_file
from vae import METHODS, RL_NOISE, LatentReasoner, Noise, collate, generator

BETA1 = 0.9  # AdamW's, which is no setting
COVERED = set()  # settings that a test of this file changes

ELSEWHERE = {  # settings that a test of another file changes
    "init": "test_train.py: test_init_keeps_all_parts_or_the_policy",
    "data": "test_train.py: test_closing_table_is_of_the_task_trained_on",
    "data_dir": "test_train.py: test_user_errors_of_train",
    "baseline": "test_train.py: test_all_stages_in_turn_and_resume",
    "resume": "test_faults.py: test_killed_and_resumed_equals_never_killed",
}


def covers(*flags):
    """Mark a test as one that changes these settings and sees the difference."""
    COVERED.update(flags)
    return lambda test: test


# --- one rl_step against a loop written here ---

LR = 0.3  # of gradient descent: large enough that ratios of a second minibatch leave the clip
STEP = 5  # the number of the rl_step
RL = dict(questions_per_step=2, group=4, minibatch=4, max_answer=5, latent_grad="score", device="cpu",
          w_acc=1.0, w_fmt=0.5, w_coh=0.25, ratio_clip=0.2, std_norm=False, latent_coef=1.0,
          latent_mean=False, kl_coef=0.0, seed=0, micro_batch=128, rl_grad_clip=0.0)
CASES = [dict(w_acc=2.0), dict(w_acc=0.0), dict(w_fmt=2.0), dict(w_fmt=0.0), dict(w_coh=2.0), dict(w_coh=0.0),
         dict(ratio_clip=0.02), dict(ratio_clip=0.9), dict(std_norm=True), dict(latent_coef=0.25),
         dict(latent_coef=0.0), dict(latent_mean=True), dict(kl_coef=0.5), dict(rl_grad_clip=0.1),
         dict(group=2), dict(minibatch=2), dict(minibatch=8), dict(max_answer=2), dict(seed=1),
         dict(questions_per_step=1)]
COVERED.update(flag for case in CASES for flag in case)


@dataclasses.dataclass
class Row:
    """What a rollout says. The right answer of every question is 1."""

    answer: str
    ended: bool
    plan: list
    accuracy: float
    form: float
    coherence: float


WHOLE, HALF, NONE = ["<<2+2=4>>", "<<4-3=1>>"], ["<<2+2=5>>", "<<4-3=1>>"], ["no", "no"]
ROWS = [Row("### 1", True, WHOLE, 1, 1, 1.0), Row("### 1", True, NONE, 1, 1, 0.0),
        Row("so ### 1", True, HALF, 1, 0, 0.5), Row("no", True, NONE, 0, 0, 0.0),
        Row("### 5", True, ["<<2+3=5>>"], 0, 1, 1.0), Row("### 1", False, WHOLE, 1, 0, 1.0),
        Row("### 1", True, NONE, 1, 1, 0.0), Row("no", True, NONE, 0, 0, 0.0)]


def rl_config(**settings):
    return train.Config(**{**RL, **settings})


def rl_model():
    """A tiny reasoner in fp64 whose rollouts say what ROWS says, row by row."""
    model, said = oracle.tiny(seed=3, K=4, dtype=torch.double), {}
    plain = model.rollout

    def rollout(*args):
        result = plain(*args)
        said.update({z.flatten()[0].item(): row for z, row in zip(result.plan.z, ROWS)})
        assert len(said) >= len(result.plan.z)  # each first latent is one of a kind
        return result

    def texts(tokens, lengths, tokenizer):
        rows = ROWS[:len(tokens)]
        return [row.answer for row in rows], [row.ended for row in rows]

    model.rollout, model.texts = rollout, texts
    model.plan_texts = lambda z, steps, tokenizer: [said[x.flatten()[0].item()].plan for x in z]
    model.set_trainable(decoder=False)
    return model


def roll(model, cfg):
    """The rollouts that rl_step must make: its randomness depends on the seed and the step alone."""
    Q, d = cfg.questions_per_step, model.policy.config.hidden_size
    noise = Noise.draw(Q * cfg.group, model.config, d, cfg.max_answer, generator(cfg.seed, RL_NOISE, STEP))
    return model.rollout([e.question for e in oracle.examples(Q)], cfg.group, noise, cfg.max_answer)


def rewards_of(cfg):
    """Of each row. Plans of wrong answers are read only where accuracy is no reward."""
    read = [bool(row.accuracy or not cfg.w_acc) for row in ROWS]
    return [cfg.w_acc * row.accuracy + cfg.w_fmt * row.form + cfg.w_coh * row.coherence * is_read
            for row, is_read in zip(ROWS, read)][:cfg.questions_per_step * cfg.group]


def advantages_of(cfg):
    """Rewards less the mean of their group; with std_norm divided by its deviation (of N - 1) + 1e-8."""
    rewards, found = rewards_of(cfg), []
    for at in range(0, len(rewards), cfg.group):
        own = rewards[at:at + cfg.group]
        scale = statistics.stdev(own) + 1e-8 if cfg.std_norm else 1.0
        found += [(r - statistics.fmean(own)) / scale for r in own]
    return found


def surrogate(new, old, rollout, row, advantage, cfg):
    """The clipped objective of one rollout: a mean over latents and stops, and one over answer tokens."""
    steps, stopped = int(rollout.plan.steps[row]), bool(rollout.plan.stopped[row])
    change = lambda name: getattr(new, name)[row] - getattr(old, name)[row]

    def mean_gain(log_ratios):
        ratio = torch.cat(log_ratios).clamp(-3, 3).exp()
        clipped = ratio.clamp(1 - cfg.ratio_clip, 1 + cfg.ratio_clip)
        return torch.minimum(ratio * advantage, clipped * advantage).mean()

    choices = [change("stop")[:steps], change("stop")[steps:steps + stopped]]  # to go on, to stop
    if new.latent is not None:
        density = change("latent")[:steps] / (rollout.plan.z.shape[-1] if cfg.latent_mean else 1)
        # to go on is part of the choice of a step's first latent
        choices = [density[:, 0] + choices[0], density[:, 1:].flatten(), choices[1]]
    gain = mean_gain([change("token")[:int(rollout.lengths[row])]])
    return gain + cfg.latent_coef * mean_gain(choices)


def gradients_by_hand(model, cfg, reference=None):
    """The clipped gradient of each optimizer step, all parameters in one vector. Moves the model."""
    rollout, log_probs, advantages = roll(model, cfg), LogProbs(model, cfg.latent_grad), advantages_of(cfg)
    params, found = [p for p in model.parameters() if p.requires_grad], []
    with torch.no_grad():
        old = log_probs(rollout)
    size = cfg.minibatch // cfg.questions_per_step  # of each group
    for at in range(0, cfg.group, size):
        rows = [q * cfg.group + g for q in range(cfg.questions_per_step) for g in range(at, at + size)]
        new = log_probs(rollout)
        loss = -sum(surrogate(new, old, rollout, row, advantages[row], cfg) for row in rows)
        if reference is not None:
            loss = loss + cfg.kl_coef * divergence(new, reference(rollout), rollout)[rows].sum()
        pieces = torch.autograd.grad(loss / cfg.minibatch, params, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(params, pieces)]
        norm = torch.cat([g.flatten() for g in pieces]).norm()
        limit = cfg.rl_grad_clip or math.inf
        found.append(torch.cat([g.flatten() for g in pieces]) * min(1.0, limit / float(norm)))
        with torch.no_grad():
            for p, g in zip(params, found[-1].split([p.numel() for p in params])):
                p -= LR * g.view_as(p)
    return found


class Descent(torch.optim.SGD):
    """Gradient descent that keeps the gradient of each step, all parameters in one vector."""

    def __init__(self, model, lr):
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=lr)
        self.gradients = []

    def step(self):
        params = self.param_groups[0]["params"]
        self.gradients.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None
                                         else p.grad.flatten().clone() for p in params]))
        super().step()


def other_policy(cfg):
    """A reference policy with other weights."""
    return LogProbs(oracle.tiny(seed=4, K=4, dtype=torch.double), cfg.latent_grad).requires_grad_(False)


def one_rl_step(cfg, lr=LR):
    """The model after it, the gradient of each optimizer step, and the statistics."""
    run = train.Run(cfg, "rl")
    run.model, run.tokenizer, run.step = rl_model(), None, STEP
    log_probs, optimizer = LogProbs(run.model, cfg.latent_grad), Descent(run.model, lr)
    reference = other_policy(cfg) if cfg.kl_coef else None
    stats = rl_step(run, log_probs, reference, optimizer, oracle.examples(cfg.questions_per_step))
    return run.model, optimizer.gradients, stats


@pytest.fixture(scope="module")
def base():
    """The gradients of one rl_step with the settings of RL."""
    return {grad: one_rl_step(rl_config(latent_grad=grad))[1] for grad in ("score", "path")}


@pytest.mark.parametrize("case, grad", [
    *[(case, "score") for case in ({}, *CASES)],
    *[(case, "path") for case in ({}, *CASES) if not case or {"latent_coef", "latent_mean"} & case.keys()]],
    ids=str)
def test_rl_step_makes_the_gradients_of_its_settings(case, grad, base):
    cfg, before = rl_config(latent_grad=grad, **case), base[grad]
    _, got, _ = one_rl_step(cfg)
    want = gradients_by_hand(rl_model(), cfg, other_policy(cfg) if cfg.kl_coef else None)
    assert len(got) == len(want) == cfg.questions_per_step * cfg.group // cfg.minibatch
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, atol=1e-4 * float(w.abs().max()), rtol=1e-4)
    # and the setting makes a difference; some only where it acts
    changed = [len(g) != len(b) or float((g - b).norm() / b.norm()) > 1e-2 for g, b in zip(got, before)]
    if "ratio_clip" in case:  # every ratio of the first minibatch is 1
        assert changed == [False, True]
    elif case == dict(latent_mean=True) and grad == "path":  # there are no densities
        assert changed == [False, False]
    else:
        assert changed[0] == bool(case)


def test_rl_step_reports_the_figures_of_its_rollouts():
    for case in ({}, dict(w_acc=0.0), dict(w_coh=2.0), dict(std_norm=True), dict(group=2, minibatch=4)):
        cfg = rl_config(**case)
        _, _, stats = one_rl_step(cfg)
        rows = ROWS[:2 * cfg.group]
        read = [row for row in rows if row.accuracy or not cfg.w_acc]
        want = dict(reward=statistics.fmean(rewards_of(cfg)),
                    accuracy=statistics.fmean(row.accuracy for row in rows),
                    well_formed=statistics.fmean(row.form for row in rows),
                    coherence=statistics.fmean(row.coherence for row in read),
                    advantage=statistics.fmean(map(abs, advantages_of(cfg))))
        assert {name: stats[name] for name in want} == pytest.approx(want, rel=1e-4), case


# --- the direction of one rl_step ---

@torch.no_grad()
def preference(model, cfg, wanted):
    """How much likelier, in log-probability, the wanted rows (bools) are than the others."""
    rollout = roll(rl_model(), cfg)
    terms, sides = LogProbs(model, cfg.latent_grad)(rollout), {True: [], False: []}
    for row, is_wanted in enumerate(wanted):  # the sum of two means, as the objective weighs them
        steps, stopped = int(rollout.plan.steps[row]), int(rollout.plan.stopped[row])
        choices = terms.latent[row, :steps].sum() + terms.stop[row, :steps + stopped].sum()
        tokens = terms.token[row, :int(rollout.lengths[row])]
        sides[is_wanted].append(float(choices / (2 * steps + stopped) + tokens.mean()))
    return statistics.fmean(sides[True]) - statistics.fmean(sides[False])


@covers("w_acc", "w_fmt", "w_coh")
@pytest.mark.parametrize("flag, part", [("w_acc", "accuracy"), ("w_fmt", "form"), ("w_coh", "coherence")])
def test_a_reward_makes_what_it_rewards_likelier(flag, part):
    """Alone, each reward raises the rows that earn it. Twice the weight raises them twice as much; without a
    weight no step is made."""
    wanted = [getattr(row, part) == 1 for row in ROWS]
    start, gains = preference(rl_model(), rl_config(), wanted), {}
    for weight in (0.0, 1.0, 2.0):
        cfg = rl_config(**{"w_acc": 0.0, "w_fmt": 0.0, "w_coh": 0.0, flag: weight}, minibatch=8)
        model, steps, _ = one_rl_step(cfg, lr=1e-5)
        gains[weight] = preference(model, cfg, wanted) - start
        assert len(steps) == bool(weight)
    assert gains[0.0] == 0 < gains[1.0]
    assert gains[2.0] == pytest.approx(2 * gains[1.0], rel=0.05)


@covers("kl_coef")
def test_the_kl_pulls_towards_the_reference():
    distance = {}
    for coef in (1e-9, 1.0, 2.0):
        cfg = rl_config(kl_coef=coef, minibatch=8)
        model, _, _ = one_rl_step(cfg, lr=1e-5)
        log_probs, rollout = LogProbs(model, cfg.latent_grad), roll(rl_model(), cfg)
        distance[coef] = divergence(log_probs(rollout), other_policy(cfg)(rollout), rollout).mean().item()
    pull = distance[1e-9] - distance[1.0]
    assert pull > 0 and distance[1e-9] - distance[2.0] == pytest.approx(2 * pull, rel=0.05)


@covers("micro_batch")
@pytest.mark.parametrize("limit, rows", [(2, [4, 4]), (4, [4, 4]), (8, [8])])
def test_micro_batch_limits_the_rows_of_a_pass_of_rl(limit, rows, monkeypatch):
    """The rows of a question stay together."""
    seen, forward = [], LogProbs.forward

    def counted(self, rollout):
        seen.append(len(rollout.tokens))
        return forward(self, rollout)

    monkeypatch.setattr(LogProbs, "forward", counted)
    one_rl_step(rl_config(micro_batch=limit, minibatch=8))
    assert seen == rows


# --- runs from the command line ---

FLAGS = dict(hidden_size=16, layers=1, heads=2, intermediate_size=24, threads=1, batch_size=8, annotated=8,
             thoughts_per_step=1, max_steps=2, cot_epochs=0.0, epochs_per_stage=1.0, final_epochs=1.0,
             warmup=0, min_lr=1.0, weight_decay=0.0, log_every=1, eval_every=0, eval_size=1, device="cpu",
             questions_per_step=4, group=4, minibatch=16, rl_warmup=0, rl_min_lr=1.0, w_coh=0.0, max_answer=4,
             grad_clip=0.0)
ONE_STEP = dict(max_iters=1)  # of the last stage, which comes after stage K
LAST = FLAGS["max_steps"] + 1  # that stage


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """What a run sets in torch does not outlive these tests."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A file of 60 questions with two or three reasoning steps. The last three are for validation."""
    lines = []
    for i in range(60):
        a, b, c = 2 + i % 7, 3 + i % 5, 1 + i % 3
        steps = f"<<{a}+{b}={a + b}>> <<{a + b}*{c}={(a + b) * c}>>" + f" <<{c}+1={c + 1}>>" * (i % 2)
        lines.append(f"Tom has {a} pens and {b} hats, {c} times. How many?||{steps} #### {i}\n")
    file = tmp_path_factory.mktemp("wiring") / "questions.txt"
    file.write_text("".join(lines))
    return str(file)


class Trained:
    """A finished run: its lines of metrics.jsonl, its weights and AdamW's state as {name: tensor}."""

    def __init__(self, out):
        [log] = out.glob("*/metrics.jsonl")
        self.lines = [json.loads(line) for line in log.read_text().splitlines()]
        self.steps = [line for line in self.lines if "lr" in line]
        self.checkpoints = sorted(log.parent.glob("step-*"))
        self.path = self.checkpoints[-1]
        self.tokenizer = Tokenizer.from_pretrained(self.path)

    def model(self):
        return LatentReasoner.from_pretrained(self.path)

    def weights(self):
        return {name: p.detach() for name, p in self.model().named_parameters()}

    def state(self, key):
        found = load_file(self.path / "optimizer.safetensors").items()
        return {name.removeprefix(f"{key}."): v for name, v in found if name.startswith(f"{key}.")}

    def gradient(self):
        """Of the last step, if it was the first one of its optimizer."""
        return {name: average / (1 - BETA1) for name, average in self.state("exp_avg").items()}


@pytest.fixture(scope="module")
def new_run(tmp_path_factory, questions):
    """new_run(flag=value, ...): the run of that command line."""
    def command(**flags):
        out, argv = tmp_path_factory.mktemp("run"), []
        for name, value in {"stage": "vae", "data": questions, **FLAGS, **flags, "out_dir": out}.items():
            switch = f"--no-{name}" if value is False else f"--{name}"
            argv += [switch] if isinstance(value, bool) else [switch, str(value)]
        train.main(argv)
        gc.freeze()  # the next run's garbage collections do not look through all that was imported
        return Trained(out)

    return command


@pytest.fixture(scope="module")
def sft(new_run):
    """new_run, but equal command lines run once. Not for tests that look into a run."""
    known = {}

    def command(**flags):
        key = json.dumps(flags, sort_keys=True)
        if key not in known:
            known[key] = new_run(**flags)
        return known[key]

    return command


def encoded(run, file, indices=range(8)):
    examples, _ = encode_all(load(file, "train"), run.tokenizer, 256)
    return [examples[i] for i in indices]


def gradients_of(model, batch):
    """{part of the loss: its gradient as {name: tensor}}."""
    model.train().requires_grad_(True)
    named, found = dict(model.named_parameters()), {}
    for part, loss in model(batch).items():
        pieces = torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
        found[part] = {name: torch.zeros_like(p) if g is None else g
                       for (name, p), g in zip(named.items(), pieces)}
    return found


def assert_close(got, want, rtol=1e-3):
    """Dicts of tensors, each up to a share of its largest number. A name that is lacking has zeros."""
    for name in got.keys() | want.keys():
        a, b = (d[name] if name in d else torch.zeros_like((got | want)[name]) for d in (got, want))
        torch.testing.assert_close(a, b, atol=rtol * max(1e-4, float(b.abs().max())), rtol=rtol,
                                   msg=lambda m: f"{name}: {m}")


# --- supervised training: weights of the losses ---

@covers("decode_coef", "lr", "thoughts_per_step")
@pytest.mark.parametrize("decode_coef, c", [(1.0, 1), (0.25, 1), (0.0, 1), (3.0, 2)])
def test_the_sft_gradient_is_answer_and_stop_and_the_weighed_decoder_loss(sft, questions, decode_coef, c):
    flags = dict(vae="no", thoughts_per_step=c, **ONE_STEP)
    start, run = sft(lr=0.0, **flags), sft(decode_coef=decode_coef, **flags)
    model, examples = start.model(), encoded(start, questions)
    assert model.config.thoughts_per_step == c
    parts = gradients_of(model, collate(examples, model.config, LAST))
    assert parts.keys() == {"answer", "stop", "decode"}
    weights = {"answer": 1.0, "stop": 1.0, "decode": decode_coef}
    want = {name: sum(w * parts[part][name] for part, w in weights.items()) for name in parts["answer"]}
    want = {name: g for name, g in want.items() if "logvar" not in name}  # nothing is sampled
    assert_close(run.gradient(), want)


@covers("beta_kl")
def test_the_kl_has_the_weight_beta_kl(sft, questions):
    """Of one latent its KL depends on the question alone, not on the noise."""
    flags = dict(max_steps=1, **ONE_STEP)
    start = sft(lr=0.0, **flags)
    kl = gradients_of(start.model(), collate(encoded(start, questions), start.model().config, 2,
                                             torch.zeros(8, 1, 1, 16)))["kl"]
    none = sft(beta_kl=0.0, **flags).gradient()
    for beta in (0.5, 2.0):
        got, want = sft(beta_kl=beta, **flags).gradient(), {name: beta * g for name, g in kl.items()}
        assert_close({name: got[name] - none[name] for name in got}, want, 5e-3)
    assert max(float(g.abs().max()) for g in kl.values()) > 1e-3


@covers("method", "vae", "stop", "decode")
@pytest.mark.parametrize("method, switches, parts", [
    ("atp", {}, {"answer", "stop", "kl", "decode"}), ("atp", {"vae": "no"}, {"answer", "stop", "decode"}),
    ("atp", {"stop": "no"}, {"answer", "kl", "decode"}), ("atp", {"decode": "no"}, {"answer", "stop", "kl"}),
    ("simcot", {}, {"answer", "decode"}), ("simcot", {"decode": "no"}, {"answer"}),
    ("coconut", {}, {"answer"}), ("coconut", {"decode": "yes"}, {"answer", "decode"}),
    ("coconut", {"stop": "yes"}, {"answer", "stop"}), ("nocot", {}, {"answer"})])
def test_parts_of_the_loss(sft, method, switches, parts):
    run = sft(method=method, **switches, **ONE_STEP)
    assert run.steps[0].keys() & {"answer", "stop", "kl", "decode"} == parts
    assert run.model().config.method == method and method in METHODS


# --- supervised training: the optimizer ---

@covers("lr", "cot_lr")
@pytest.mark.parametrize("stage, lr", [(0, 0.008), (LAST, 0.004)])
def test_peak_learning_rates(sft, stage, lr):
    """AdamW's first step is lr times the sign of the gradient; in the text stage it is cot_lr."""
    text = dict(cot_epochs=1.0, epochs_per_stage=0.0, final_epochs=0.0) if stage == 0 else {}
    before = sft(lr=0.0, cot_lr=0.0, **text, **ONE_STEP).weights()
    run = sft(**dict(lr=lr, cot_lr=0.05) if stage else dict(lr=0.05, cot_lr=lr), **text, **ONE_STEP)
    want = {name: -lr * g / (g.abs() + 1e-8) for name, g in run.gradient().items()}
    assert_close({name: run.weights()[name] - before[name] for name in want}, want)
    assert run.steps[0]["lr"] == pytest.approx(lr) and run.steps[0]["stage"] == stage


@covers("weight_decay", "decay_all")
@pytest.mark.parametrize("everything", (False, True))
def test_weight_decay(sft, everything):
    """Apart from its gradient a weight loses lr x decay of itself; norms and biases only with decay_all."""
    flags = dict(lr=0.05, decay_all=everything, **ONE_STEP)
    before, plain = sft(**{**flags, "lr": 0.0}).weights(), sft(**flags).weights()
    for decay in (0.2, 0.6):
        got, trained = sft(weight_decay=decay, **flags).weights(), sft(**flags).gradient()
        want = {name: -0.05 * decay * before[name] * (before[name].dim() > 1 or everything)
                for name in trained}
        assert {before[name].dim() for name in want} == {1, 2}
        assert_close({name: got[name] - plain[name] for name in want}, want)


@covers("beta2")
@pytest.mark.parametrize("beta2", (0.9, 0.98))
def test_beta2(sft, beta2):
    run = sft(beta2=beta2, **ONE_STEP)
    assert_close(run.state("exp_avg_sq"), {name: (1 - beta2) * g**2 for name, g in run.gradient().items()})


@covers("grad_clip")
def test_gradients_are_clipped_to_their_norm(sft):
    norm = lambda run: math.sqrt(sum(float(g.square().sum()) for g in run.gradient().values()))
    free = sft(**ONE_STEP)
    assert norm(free) == pytest.approx(free.steps[0]["grad_norm"], rel=1e-4) and norm(free) > 1
    for limit, want in ((0.5, 0.5), (1e4, norm(free))):
        run = sft(grad_clip=limit, **ONE_STEP)
        assert norm(run) == pytest.approx(want, rel=1e-3)
        assert run.steps[0]["grad_norm"] == pytest.approx(norm(free), rel=1e-4)  # the norm before clipping


# --- supervised training: curriculum and schedule ---

@covers("batch_size", "cot_epochs", "epochs_per_stage", "final_epochs", "max_steps", "annotated", "max_iters",
        "warmup", "min_lr", "lr", "cot_lr")
@pytest.mark.parametrize("flags, stages", [
    ({}, [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2),
    (dict(cot_epochs=2.0), [0] * 4 + [1] * 2 + [2] * 2 + [3] * 2),
    (dict(cot_epochs=0.0), [1] * 2 + [2] * 2 + [3] * 2),
    (dict(epochs_per_stage=2.0), [0] * 2 + [1] * 4 + [2] * 4 + [3] * 2),
    (dict(final_epochs=3.0), [0] * 2 + [1] * 2 + [2] * 2 + [3] * 6),
    (dict(batch_size=2), [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4),
    (dict(annotated=4), [0, 1, 2, 3]),
    (dict(max_steps=3), [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 2),
    (dict(max_iters=4), [0, 1, 2, 3]),
    (dict(min_lr=0.1), [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2),
    (dict(warmup=2), [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2),
    (dict(warmup=5, min_lr=0.0, lr=0.01, cot_lr=0.02), [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2)], ids=str)
def test_stages_and_learning_rates(sft, flags, stages):
    """One cosine over the text stage, another over the latent stages; each stage has its own warm-up."""
    flags = dict(min_lr=0.5, batch_size=4, cot_epochs=1.0) | flags
    steps = sft(**flags).steps
    assert [line["stage"] for line in steps] == stages
    cfg, texts = train.Config(**{**FLAGS, "lr": 1.5e-3, "cot_lr": 2e-3, **flags}), stages.count(0)
    for i, stage in enumerate(stages):
        progress = (i - texts) / (len(stages) - texts) if stage else i / texts
        cosine = cfg.min_lr + (1 - cfg.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        warm = min(1.0, (i - stages.index(stage) + 1) / cfg.warmup) if cfg.warmup else 1.0
        assert steps[i]["lr"] == pytest.approx((cfg.lr if stage else cfg.cot_lr) * cosine * warm), i


@covers("seed", "batch_size", "max_iters")
@pytest.mark.parametrize("seed, size", [(0, 2), (1, 2), (1, 5)])
def test_seed_and_batch_size_choose_the_examples(sft, questions, seed, size):
    """From one checkpoint, so that the weights do not depend on the seed."""
    start = sft(vae="no", **ONE_STEP)
    flags = dict(init=str(start.path), vae="no", seed=seed, batch_size=size, **ONE_STEP)
    chosen, others = (train.batch_indices(s, 0, 8, size) for s in (seed, seed + 1))
    assert len(chosen) == size and set(chosen) != set(others)
    chosen = encoded(start, questions, chosen)
    want = start.model()(collate(chosen, start.model().config, LAST))
    got = sft(**flags).steps[0]
    assert {k: got[k] for k in want} == pytest.approx({k: v.item() for k, v in want.items()}, rel=1e-4)


@covers("seed", "hidden_size", "layers", "heads", "intermediate_size", "context")
def test_a_model_from_nothing(sft, new_run):
    """Its weights are the seed's, its sizes those that were asked for."""
    start = sft(lr=0.0, **ONE_STEP)
    same, other = (new_run(lr=0.0, seed=seed, **ONE_STEP).weights() for seed in (0, 1))
    for name, p in start.weights().items():
        assert p.equal(same[name]) and (p.dim() == 1 or not p.equal(other[name])), name
    sizes = dict(hidden_size=24, layers=2, heads=3, intermediate_size=40, context=200)
    found = sft(**sizes, **ONE_STEP).model().policy.config
    assert (found.hidden_size, found.num_hidden_layers, found.num_attention_heads) == (24, 2, 3)
    assert (found.intermediate_size, found.max_position_embeddings) == (40, 200)


@covers("seed")
def test_noise_of_latents_is_the_seeds(sft, tmp_path):
    """One question, so that the order of examples is no other."""
    file = tmp_path / "two.txt"
    file.write_text(2 * "Tom has 3 pens and 4 hats. How many?||<<3+4=7>> #### 7\n")
    start = str(sft(lr=0.0, **ONE_STEP).path)
    losses = {(vae, seed): sft(init=start, vae=vae, seed=seed, data=str(file), batch_size=1,
                               **ONE_STEP).steps[0]["answer"] for vae in ("yes", "no") for seed in (0, 1)}
    assert losses["no", 0] == losses["no", 1]
    assert losses["yes", 0] != pytest.approx(losses["yes", 1], rel=1e-3)


@covers("micro_batch")
@pytest.mark.parametrize("limit, rows", [(3, [2, 3, 3]), (4, [4, 4]), (128, [8])])
def test_micro_batch_limits_the_rows_of_a_pass_of_sft(new_run, limit, rows, monkeypatch):
    seen, forward = [], LatentReasoner.forward

    def counted(self, batch):
        seen.append(len(batch.steps))
        return forward(self, batch)

    monkeypatch.setattr(LatentReasoner, "forward", counted)
    new_run(micro_batch=limit, **ONE_STEP)
    assert sorted(seen) == rows


@covers("thoughts_per_step", "max_steps")
@pytest.mark.parametrize("c, steps", [(1, 2), (2, 2), (2, 3)])
def test_latents_of_a_plan_without_a_stop_head(sft, c, steps):
    valid = sft(thoughts_per_step=c, max_steps=steps, stop="no", **ONE_STEP).lines[-1]["valid"]
    assert valid["latents"] == c * steps


@covers("max_answer")
@pytest.mark.parametrize("limit", (2, 5))
def test_max_answer_limits_answers_of_validation(sft, limit):
    """An untrained answer, here after two latents, goes on to the limit."""
    valid = sft(method="coconut", lr=0.0, max_answer=limit, **ONE_STEP).lines[-1]["valid"]
    assert (valid["latents"], valid["tokens"]) == (2, 2 + limit)


@covers("preset")
@pytest.mark.parametrize("preset", train.PRESETS)
def test_a_preset_gives_its_settings(preset):
    """A flag that is given goes before it; a setting that it does not name is Config's own."""
    plain, cfg = train.resolve({}), train.resolve({"preset": preset, "lr": 0.5})
    changed = {name for name, value in vars(cfg).items() if value != getattr(plain, name)}
    assert cfg.lr == 0.5 and len(changed) > 5
    assert changed - {"preset", "annotated", "lr"} <= train.PRESETS[preset].keys()
    for name, value in train.PRESETS[preset].items():
        assert name == "lr" or getattr(cfg, name) == value, name


# --- reinforcement learning from the command line ---

@pytest.fixture
def rl_run(sft, new_run, monkeypatch):
    """rl_run(flag=value, ...): the run, and what each call of rl_step was given. Every other answer is well
    formed, so that rewards differ."""
    def texts(self, tokens, lengths, tokenizer):
        return ["### 4" if i % 2 else "no" for i in range(len(tokens))], [True] * len(tokens)

    calls = []

    def recorded(run, ddp, reference, optimizer, examples):
        calls.append(dict(ddp=ddp, reference=reference, lr={group["lr"] for group in optimizer.param_groups},
                          questions=[e.example.id for e in examples]))
        return rl_step(run, ddp, reference, optimizer, examples)

    def command(**flags):
        calls.clear()
        return new_run(stage="rl", init=start, **flags), list(calls)

    start = sft(lr=0.0, **ONE_STEP).path
    monkeypatch.setattr(LatentReasoner, "texts", texts)
    monkeypatch.setattr(train, "rl_step", recorded)
    return command


@covers("rl_lr", "rl_min_lr", "rl_warmup", "rl_iters", "max_iters", "questions_per_step")
@pytest.mark.parametrize("flags, total", [
    (dict(rl_iters=4), 4), (dict(rl_iters=4, rl_lr=0.01), 4), (dict(rl_iters=4, rl_min_lr=0.1), 4),
    (dict(rl_iters=5, rl_warmup=3, rl_min_lr=0.0), 5), (dict(rl_iters=5, max_iters=2), 2),
    (dict(rl_iters=0, questions_per_step=16, minibatch=64), 3)], ids=str)
def test_schedule_of_rl(rl_run, flags, total):
    """rl_iters 0 is one epoch: of 57 questions 3 batches of 16."""
    run, calls = rl_run(**flags)
    cfg = train.Config(**{**FLAGS, "rl_lr": 2e-4, **flags})
    assert len(calls) == len(run.steps) == total
    for i, (line, call) in enumerate(zip(run.steps, calls)):
        cosine = cfg.rl_min_lr + (1 - cfg.rl_min_lr) * (1 + math.cos(math.pi * i / total)) / 2
        want = cfg.rl_lr * cosine * (min(1.0, (i + 1) / cfg.rl_warmup) if cfg.rl_warmup else 1.0)
        assert line["lr"] == pytest.approx(want)
        assert call["lr"] == {line["lr"]}
        assert len(call["questions"]) == cfg.questions_per_step


@covers("rl_lr", "beta2")
def test_the_optimizer_of_rl(rl_run, sft):
    """AdamW without decay: its first step is rl_lr times the sign of the gradient."""
    start = sft(lr=0.0, **ONE_STEP).weights()
    for lr, beta2 in ((1e-3, 0.9), (2e-4, 0.98)):
        run, _ = rl_run(rl_iters=1, rl_lr=lr, beta2=beta2, weight_decay=0.5, decay_all=True)
        after = run.weights()
        want = {name: -lr * g / (g.abs() + 1e-8) for name, g in run.gradient().items()}
        assert len(want) > 10 and not any(name.startswith("decoder") for name in want)
        assert_close({name: after[name] - start[name] for name in want}, want, 5e-3)
        assert_close(run.state("exp_avg_sq"), {n: (1 - beta2) * g**2 for n, g in run.gradient().items()})


@covers("latent_grad", "kl_coef", "seed")
def test_what_rl_step_is_given(rl_run, sft):
    """Densities of latents with score alone; a reference, which is where RL began, with kl_coef alone."""
    start, orders = sft(lr=0.0, **ONE_STEP).weights(), {}
    for grad, coef, seed in (("score", 0.0, 0), ("path", 0.5, 0), ("score", 0.5, 1)):
        _, [call] = rl_run(latent_grad=grad, kl_coef=coef, seed=seed, rl_iters=1)
        assert (call["reference"] is not None) == (coef > 0)
        if coef:
            assert_close({name: p for name, p in call["reference"].model.named_parameters()},
                         {name: p for name, p in start.items() if not name.startswith("decoder")}, 0.0)
        model = call["ddp"].model
        noise = Noise.draw(2, model.config, 16, 4, generator(0))
        rollout = model.rollout([[1, 2], [3]], 1, noise, 4)
        for log_probs in filter(None, (call["ddp"], call["reference"])):
            assert (log_probs(rollout).latent is not None) == (grad == "score")
        orders[seed] = call["questions"]
    assert orders[0] != orders[1]


# --- running ---

@covers("log_every", "eval_every", "eval_size", "save_every", "keep", "threads")
def test_when_a_run_logs_and_validates_and_saves(new_run, monkeypatch):
    sizes, threads, evaluate = [], [], train.evaluate

    def counted(model, tokenizer, encoded, *args, **more):
        sizes.append(len(encoded))
        return evaluate(model, tokenizer, encoded, *args, **more)

    monkeypatch.setattr(train, "evaluate", counted)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    flags = dict(epochs_per_stage=0.0, final_epochs=6.0, batch_size=8)  # six steps of one stage
    for log, validate, size, save, keep, steps, valid, saved in (
            (1, 0, 1, 1, 2, [1, 2, 3, 4, 5, 6], [6], [5, 6]), (2, 0, 2, 2, 9, [2, 4, 6], [6], [2, 4, 6]),
            (4, 2, 3, 9, 2, [4, 6], [2, 4, 6], [6])):
        sizes.clear()
        run = new_run(log_every=log, eval_every=validate, eval_size=size, save_every=save, keep=keep, **flags)
        assert [line["step"] for line in run.steps] == steps
        assert [line["step"] for line in run.lines if "valid" in line] == valid
        assert sizes == [size] * len(valid)
        assert [int(ckpt.name[-1]) for ckpt in run.checkpoints] == saved
    new_run(threads=3, **flags)
    assert threads == [1, 1, 1, 3]


@covers("stage", "out_dir")
def test_stages_and_their_folders(sft, rl_run):
    """Trained finds the log in out_dir."""
    assert sft(stage="cot", method="cot", max_iters=2).steps[-1]["stage"] == 0
    assert sft(**ONE_STEP).steps[0]["stage"] == LAST
    assert rl_run(rl_iters=1)[0].steps[0]["stage"] == "rl"


@covers("compile", "activation_checkpointing", "dtype", "device")
def test_how_a_run_computes(new_run, rl_run, monkeypatch):
    """What is set while a loss, or the log-probabilities of RL, are computed."""
    seen, compiled = set(), []

    def spied(forward):
        def spy(self, batch):
            model = getattr(self, "model", self)
            assert {llama.activation_checkpointing for llama in model.llamas()} == {
                model.policy.activation_checkpointing}
            seen.add((model.policy.activation_checkpointing, torch.is_autocast_enabled("cpu")))
            return forward(self, batch)
        return spy

    for module in (LatentReasoner, LogProbs):
        monkeypatch.setattr(module, "forward", spied(module.forward))
    monkeypatch.setattr(LLaMA, "compile_blocks", lambda self: compiled.append(self))
    for run in (lambda **flags: new_run(**flags, **ONE_STEP), lambda **flags: rl_run(**flags, rl_iters=1)):
        for again, dtype, compile in (("yes", "bfloat16", "no"), ("no", "float32", "yes")):
            seen.clear()
            compiled.clear()
            run(activation_checkpointing=again, dtype=dtype, compile=compile)
            assert seen == {(again == "yes", dtype == "bfloat16")}
            assert len(compiled) == (2 if compile == "yes" else 0)  # policy and decoder
    with pytest.raises(ValueError, match="--device cuda"):  # the tests see no GPU
        new_run(device="cuda")


# --- nothing is forgotten ---

def test_every_setting_is_covered():
    """A new flag needs a test here that changes it, or one elsewhere: then name it in ELSEWHERE."""
    flags = {f.name for f in dataclasses.fields(train.Config)}
    missing, gone = flags - COVERED - ELSEWHERE.keys(), (COVERED | ELSEWHERE.keys()) - flags
    assert not missing, f"no test of their wiring: {sorted(missing)}"
    assert not gone, f"settings that are no more: {sorted(gone)}"
    assert not COVERED & ELSEWHERE.keys()
    for flag, place in ELSEWHERE.items():
        file, name = place.split(": ")
        tree = ast.parse(Path(__file__).with_name(file).read_text())
        tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert name in tests, f"{flag}: {place} is no more"


def test_defaults_of_settings_live_in_config_alone():
    """A function of rl.py that has a default would repeat that of Config, or contradict it."""
    members = [value for value in vars(rl).values() if inspect.isclass(value)]
    functions = [f for owner in (rl, *members) for f in vars(owner).values()
                 if inspect.isfunction(f) and f.__module__ == rl.__name__ and not f.__name__ == "__new__"]
    assert len(functions) > 8
    for function in functions:
        given = {name for name, p in inspect.signature(function).parameters.items()
                 if p.default is not inspect.Parameter.empty}
        assert not given, f"rl.{function.__qualname__} has defaults: {given}"
