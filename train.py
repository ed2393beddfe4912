"""Train ATP-Latent and its baselines.

    python train.py                                        small model, built-in task, from nothing, on a CPU:
                                                           answer-only, vae, rl and their evaluation
    python train.py --stage vae --init DIR --data gsm8k    one stage, from a Hugging Face LLaMA
    torchrun --nproc_per_node=8 train.py --stage vae ...   the same numbers, faster
    python train.py --stage rl                             from the checkpoint that vae left in out/vae

--no-std_norm, --no-... turn off a switch that a case has on.
"""

import argparse
import ctypes
import fcntl
import gc
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from data import ASSETS, BUILTIN, DATASETS, TEST_SETS, Parser, Tokenizer, cli, encode_all, load
from eval import STEP_FOLDER, evaluate, evaluate_runs, find_checkpoint, read_state
from model import LLaMA, LLaMAConfig, check_tensors, save_tensors, tensor_headers, write_json
from rl import LogProbs, rl_step
from vae import (END, METHODS, RL_ORDER, SFT_NOISE, START, WEIGHTS, LatentConfig, LatentReasoner,
                 collate, device_of, generator, moved, remaining_text)


# --- settings ---

def flag(default, note="", **more):
    """A field of Config and its note in --help, else its choices. default: or all choices, the default first.
    more: least; chain, pretrained: the default there; own: not taken over from --init's checkpoint; free: a
    resumed run may change it."""
    choices = default if isinstance(default, tuple) else None
    more |= dict(note=note or ", ".join(choices), choices=choices)
    return field(default=choices[0] if choices else default, metadata=more)


SIGNALS = (signal.SIGINT, signal.SIGTERM)
AUTO = ("auto", "yes", "no")
RUN = dict(own=True, free=True)


@dataclass
class Config:
    stage: str = flag(("all", "cot", "vae", "rl"), "all (vae, rl, evaluation), cot, vae, rl", **RUN)
    method: str = flag(tuple(METHODS))
    init: str = flag("", "Hugging Face LLaMA, or checkpoint or run of ours (rl: out_dir/vae)", **RUN)
    data: str = flag("builtin", "builtin, chain, gsm8k, gsm8k_aug, or a file", pretrained="gsm8k_aug")
    data_dir: str = flag("data", "folder of the published files")
    annotated: int = flag(4000, "so many questions show their steps (0: all; other data: 0)", pretrained=0)
    out_dir: str = flag("out", "runs go to out_dir/vae, out_dir/rl, ...", **RUN)
    resume: bool = flag(False, "go on from the newest checkpoint of the same run", **RUN)
    seed: int = flag(0, "of weights, data order and samples", own=True)
    baseline: int = flag(1200, "stage all: steps of an answer-only model", chain=5000, pretrained=0, **RUN)
    hidden_size: int = flag(96, "d", least=1)
    layers: int = flag(4, "transformer blocks", least=1)
    heads: int = flag(4, "attention heads", least=1)
    intermediate_size: int = flag(256, "width of the SwiGLU", least=1)
    context: int = flag(256, "longest sequence; longer examples are left out", least=1, pretrained=512)
    thoughts_per_step: int = flag(1, "c: latents a reasoning step", least=1, pretrained=2)
    max_steps: int = flag(6, "K: latent steps (pretrained simcot, coconut: 3)", least=1, pretrained=10)
    vae: str = flag(AUTO, "sample latents, with a KL term (auto: as the method says)")
    stop: str = flag(AUTO, "stop head")
    decode: str = flag(AUTO, "decoder and its loss")
    batch_size: int = flag(32, "examples an optimizer step, over all processes", least=1, pretrained=256)
    micro_batch: int = flag(128, "rows of one pass (SFT, 0: as many as fit)", free=True, pretrained=0)
    cot_epochs: float = flag(12.0, "stage 0: text chain of thought", chain=1.2, pretrained=0.0)
    epochs_per_stage: float = flag(1.2, "each further stage", chain=0.1, pretrained=2.0)
    final_epochs: float = flag(9.6, "further epochs, all steps latent", chain=2.2, pretrained=5.0)
    max_iters: int = flag(0, "scale the curriculum to so many steps (rl: cut)", own=True)
    cot_lr: float = flag(2e-3, "peak learning rate of stage 0", pretrained=1e-4)
    lr: float = flag(1.5e-3, "peak learning rate of the latent stages", pretrained=1e-4)
    min_lr: float = flag(0.02, "the cosine ends at this share of the peak (1: constant)", pretrained=1.0)
    warmup: int = flag(50, "steps of linear warm-up of each new optimizer", pretrained=0)
    weight_decay: float = flag(0.4, "AdamW", pretrained=0.01)
    decay_all: bool = flag(False, "decay norms and biases too", pretrained=True)
    beta2: float = flag(0.98, "AdamW", pretrained=0.999)
    clip: float = flag(1.0, "gradient norm (0: not clipped)", pretrained=0.0)
    beta_kl: float = flag(1e-3, "weight of the KL term")
    decode_coef: float = flag(1.0, "weight of the decoder loss (1: the paper's sum over tokens)")
    rl_lr: float = flag(2e-4, "peak learning rate", pretrained=1e-6)
    rl_min_lr: float = flag(0.0, "as --min_lr", pretrained=1.0)
    rl_warmup: int = flag(10, "as --warmup", pretrained=0)
    rl_clip: float = flag(1.0, "as --clip")
    rl_iters: int = flag(280, "batches of questions (0: one epoch)", pretrained=0)
    questions_per_step: int = flag(64, "over all processes", least=1, pretrained=16)
    group: int = flag(8, "rollouts a question", least=2)
    minibatch: int = flag(512, "rollouts an optimizer step, over all processes", least=1, pretrained=16)
    w_acc: float = flag(1.0, "reward of a right answer (0: coherence only, no labels)")
    w_fmt: float = flag(0.5, "reward of a well-formed answer")
    w_coh: float = flag(0.1, "reward of coherence")
    ratio_clip: float = flag(0.2, "PPO")
    std_norm: bool = flag(False, "divide advantages by the group's deviation", pretrained=True)
    latent_grad: str = flag(("path", "score"), pretrained="score")
    latent_coef: float = flag(1.0, "weight of the terms of latents and stops")
    latent_mean: bool = flag(False, "score: density averaged, not summed, over d")
    kl_coef: float = flag(0.0, "weight of the KL from the policy that RL began with")
    max_answer: int = flag(16, "most answer tokens of a rollout", least=1)
    eval_every: int = flag(250, "steps between validations (0: only at the end)", pretrained=1000)
    eval_size: int = flag(256, "validation questions", least=1)
    log_every: int = flag(10, "steps between lines of metrics.jsonl", least=1, free=True)
    save_every: int = flag(500, "steps between checkpoints", least=1, free=True, pretrained=1000)
    keep: int = flag(2, "checkpoints kept", least=1, free=True)
    device: str = flag(("auto", "cpu", "cuda"), **RUN)
    dtype: str = flag(("auto", "float32", "bfloat16"), "autocast (auto: on a GPU, not for score)", own=True)
    compile: str = flag(AUTO, "torch.compile of the blocks (auto: on a GPU)", **RUN)
    activation_checkpointing: str = flag(AUTO, "of wide passes (auto: on a GPU)", free=True)
    threads: int = flag(0, "CPU threads (0: torch's choice)", **RUN)

    def __post_init__(self):
        """ValueError for a value out of range, naming the flag."""
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least", 0)
            kinds = (int, float) if f.type is float else (f.type,)
            wrong = type(value) not in kinds or value not in (f.metadata["choices"] or [value])
            if wrong or (f.type in (int, float) and not least <= value < math.inf):
                raise ValueError(f"--{f.name} cannot be {value!r}")
        if self.stage == "cot" and self.method != "cot":
            raise ValueError(f"--stage cot is --method cot: leave --method {self.method} out")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"--hidden_size {self.hidden_size}: no multiple of twice --heads {self.heads}")
        if not self.cot_epochs + self.epochs_per_stage + self.final_epochs:
            raise ValueError("--cot_epochs, --epochs_per_stage and --final_epochs leave no step")
        batch = self.questions_per_step * self.group
        if self.minibatch % self.questions_per_step or batch % self.minibatch:
            raise ValueError(f"--minibatch {self.minibatch}: not --questions_per_step x a divisor of --group")
        if self.thoughts_per_step * self.max_steps >= self.context:
            raise ValueError("--thoughts_per_step times --max_steps leaves no room in --context")


FIELDS = {f.name: f for f in fields(Config)}
SECTIONS = {"stage": "run", "hidden_size": "model from nothing", "thoughts_per_step": "latent reasoning",
            "batch_size": "supervised stage", "rl_lr": "reinforcement learning", "eval_every": "running"}


def defaults(case):
    """What differs by default in a case: chain, or pretrained (the paper's recipe)."""
    return {name: f.metadata[case] for name, f in FIELDS.items() if case in f.metadata}


def help_text():
    text = f"{__doc__}\n  {'setting':<27}{'default':>9}{'chain':>7}{'pretrained':>12}\n"
    for name, f in FIELDS.items():
        text += f"{SECTIONS[name]}:\n" if name in SECTIONS else ""
        chain, pretrained = (str(f.metadata.get(case, "")) for case in ("chain", "pretrained"))
        text += f"  --{name:<25}{f.default!s:>9}{chain:>7}{pretrained:>12}  {f.metadata['note']}\n"
    return text


def parse(argv):
    """The flags that were given, as a dict. Each field of Config is a flag, --no-... too if it is boolean."""
    parser = Parser(argument_default=argparse.SUPPRESS)
    parser.format_help = help_text
    for name, f in FIELDS.items():
        switch = dict(action=argparse.BooleanOptionalAction)
        kind = switch if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(f"--{name}", **kind)
    return vars(parser.parse_args(argv))


def resolve(given):
    """The Config of a run: defaults, then those of its case or its --init, then the flags."""
    init, stage, values = given.get("init", ""), given.get("stage"), {}
    if stage == "rl" and not init:
        init = str(Path(given.get("out_dir", Config.out_dir), "vae"))
    if init and Path(init, "config.json").is_file() and not Path(init, "train.json").is_file():
        values = defaults("pretrained")
        if given.get("method") in ("simcot", "coconut"):
            values |= {"max_steps": 3, "final_epochs": 19.0}  # as many epochs as 10 steps have
    elif init:
        init = str(find_checkpoint(init))
        saved = read_state(init)["config"]
        values = {k: v for k, v in saved.items() if k in FIELDS and not FIELDS[k].metadata.get("own")}
        values["baseline"] = 0  # it would not begin from nothing
        if saved.get("stage") == "cot" and stage in (None, "all", "vae"):
            del values["method"]  # text was the warm-up
    elif given.get("data") == "chain":
        values = defaults("chain")
    if given.get("data", "builtin") not in ("builtin", values.get("data")):
        values["annotated"] = 0  # the default is builtin's
    if stage == "cot":
        values["method"] = "cot"
    return Config(**{**values, **given, "init": init})


# --- set-up ---

class Run:
    """What a stage works with: processes, device, folder, log. begin() adds model, tokenizer, data."""

    def __init__(self, cfg, name, resumed=None, step=0):
        self.cfg, self.name, self.dir = cfg, name, Path(cfg.out_dir, name)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.main, self.device = self.rank == 0, device_of(cfg.device)
        self.gpu = self.device.type == "cuda"
        on = {"auto": self.gpu, "yes": True, "no": False, "bfloat16": True, "float32": False}
        self.compile, self.repeats = on[cfg.compile], on[cfg.activation_checkpointing]
        # a density is a sum over d, in which bfloat16 or TF32 would move every ratio out of the clip
        exact = name == "rl" and cfg.latent_grad == "score" and cfg.dtype == "auto"
        self.bf16 = on[cfg.dtype] and not exact
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, self.bf16)
        torch.set_float32_matmul_precision("highest" if exact or cfg.dtype == "float32" else "high")
        self.began, self.signal = time.time(), 0  # signal: the number of one that asks the run to stop
        self.resumed, self.step = resumed, step  # the checkpoint that the run goes on from, steps made

    def wrap(self, module):
        return module if self.world == 1 else DDP(module, gradient_as_bucket_view=True)

    def no_sync(self, ddp, more):
        """Gradients are averaged over processes at the last micro-batch only, not while there are more."""
        return ddp.no_sync() if self.world > 1 and more else nullcontext()

    def mean(self, values):
        """Dict of numbers or tensors of one number -> dict of floats, averaged over processes."""
        numbers = [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values.values()]
        t = torch.stack(numbers)
        if self.world > 1:
            dist.all_reduce(t)
        return dict(zip(values, (t / self.world).tolist()))

    def log(self, **values):
        """A line of metrics.jsonl, with seconds since the start and the GPU's peak in GiB."""
        values["seconds"] = round(time.time() - self.began, 2)
        if self.gpu:
            values["memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if self.main:
            with open(self.dir / "metrics.jsonl", "a") as f:
                f.write(json.dumps(values) + "\n")

    def say(self, text):
        if self.main:
            tqdm.write(f"{self.name}: {text}")
            sys.stdout.flush()

    def steps(self, total):
        """The steps still to be made, as a bar where there is a terminal."""
        disable = None if self.main else True
        self.bar = tqdm(range(self.step, total), self.name, total, initial=self.step, disable=disable)
        return self.bar

    def clip_gradients(self, optimizer, clip):
        """The gradient norm before clipping; FloatingPointError where it is not finite."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(params, clip or math.inf))
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {self.step + 1}: the gradient norm is {norm}; "
                                     "the last checkpoint stands")
        return norm

    def ask_to_stop(self, number, _):
        """Ctrl-C and SIGTERM let the step end and a checkpoint be written. A second one stops at once."""
        self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def asked_to_stop(self):
        """The same answer on all processes: a signal may reach them at different steps."""
        return self.signal > 0 if self.world == 1 else self.mean({"signal": self.signal})["signal"] > 0


@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(seed, step, n, size):
    """Indices of the examples of global batch `step`. Epochs follow one another without a short batch."""
    return [int(permutation(seed, p // n, n)[p % n]) for p in range(step * size, (step + 1) * size)]


def make_optimizer(model, cfg, weight_decay=0.0, ckpt=None):
    """AdamW, with the state of checkpoint ckpt. Norms and biases (vectors) decay only with cfg.decay_all.
    ValueError where the state does not fit: fused AdamW would go beyond the end of a tensor."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [p for p in named.values() if (p.dim() > 1) == matrices],
               "weight_decay": weight_decay * (matrices or cfg.decay_all)} for matrices in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)
    if ckpt:
        file = ckpt / "optimizer.safetensors"
        found, wanted = tensor_headers(file), {}
        for name, p in named.items():
            if f"step.{name}" in found:  # what never had a gradient has no state
                wanted |= {f"step.{name}": torch.zeros(()), f"exp_avg.{name}": p, f"exp_avg_sq.{name}": p}
        check_tensors(found, wanted, file)
        for name, v in load_file(file).items():
            key, name = name.split(".", 1)
            optimizer.state[named[name]][key] = v.to(named[name].device)
    return optimizer


def set_lr(optimizer, peak, least, progress, warm):
    """Cosine from `peak` to `least` times that over progress 0 to 1, times the warm-up's share `warm`."""
    lr = peak * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))) * min(1.0, warm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def build(cfg, run):
    """Model and tokenizer that cfg asks for. Of a checkpoint with other parts (heads, decoder) only the
    policy is kept; RL refuses it."""
    torch.manual_seed(generator(cfg.seed, WEIGHTS).initial_seed())
    init, model, tokenizer = cfg.init, None, Tokenizer.from_pretrained(cfg.init or ASSETS)
    asked = {"vae": cfg.vae, "stop": cfg.stop, "decode": cfg.decode}
    parts = METHODS[cfg.method] | {part: v == "yes" for part, v in asked.items() if v != "auto"}
    if init and Path(init, "latent.json").is_file():
        model = LatentReasoner.from_pretrained(init, device=run.device, decode=parts["decode"])
    if init:
        policy = model.policy if model else LLaMA.from_pretrained(init, device=run.device)
    known = START in tokenizer.special
    start, end = tokenizer.add_special(START, END)
    if not init:
        policy = LLaMA(LLaMAConfig(
            tokenizer.vocab_size, cfg.hidden_size, cfg.intermediate_size, cfg.layers, cfg.heads, cfg.heads,
            cfg.hidden_size // cfg.heads, cfg.context, eos_token_id=tokenizer.eos_id))
    latent = LatentConfig(**parts, method=cfg.method, max_steps=cfg.max_steps, start_id=start, end_id=end,
                          thoughts_per_step=cfg.thoughts_per_step, eos_id=tokenizer.end_id(),
                          vocab_size=tokenizer.vocab_size)
    same = model and all(getattr(model.config, part) == parts[part] for part in ("head", "stop", "decode"))
    if run.name == "rl" and not (same and parts["vae"] <= model.config.vae):  # or sigma would be untrained
        raise ValueError(f"--stage rl: {init} has other parts (heads, decoder, VAE) than this run asks for")
    if run.name == "rl" and cfg.w_coh and not cfg.w_acc and not parts["decode"]:
        raise ValueError(f"--w_acc 0 --w_coh {cfg.w_coh}: {init} has no decoder to read plans with")
    if same:
        model.configure(latent)
        return model, tokenizer
    if model:
        run.say(f"{init} has other parts (heads, decoder): only its policy is kept")
    if not known:
        like = tokenizer.encode_ordinary("<<")  # what a step begins with
        policy.add_tokens([start, end], like[0] if len(like) == 1 else None)
    return LatentReasoner(policy, latent).to(run.device), tokenizer


def read_data(run, split):
    """Encoded examples of a split. Imitation takes those that show their steps, at most cfg.annotated; RL,
    validation and answer-only training take all."""
    cfg, data = run.cfg, run.cfg.data
    context = min(cfg.context, run.model.policy.config.max_position_embeddings)
    fits, long = encode_all(load(data, split, cfg.data_dir), run.tokenizer, context)
    imitates = split == "train" and run.name != "rl" and cfg.method != "nocot"
    kept = [e for e in fits if e.steps][:cfg.annotated or None] if imitates else fits
    if not kept:
        raise ValueError(f"--data {data}: no example of {split} is left: too long, without steps or held out")
    if long or len(kept) < len(fits):
        run.say(f"{data} {split}: {len(kept)} examples; left out {long} longer than {context} tokens, "
                f"{len(fits) - len(kept)} without steps or beyond --annotated")
    return kept


# --- checkpoints ---

def save_checkpoint(run, optimizer):
    """A complete folder step-N: written under another name, then renamed."""
    final = run.dir / f"step-{run.step:07d}"
    part = run.dir / f".tmp-{final.name}"
    names = {p: n for n, p in run.model.named_parameters()}
    tensors = {f"{key}.{names[p]}": v for p, s in optimizer.state.items() for key, v in s.items()}
    try:
        run.model.save_pretrained(part)
        run.tokenizer.save_pretrained(part)
        save_tensors(tensors, part / "optimizer.safetensors")
        with open(run.dir / "metrics.jsonl", "ab") as log:
            logged = log.tell()
        write_json(part / "train.json", {"config": vars(run.cfg), "step": run.step, "logged": logged,
                                         "saved": time.time()})
        os.replace(part, final)
    except OSError as e:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{final} could not be written ({e}); earlier checkpoints stand") from None
    tidy(run, run.cfg.keep)


def tidy(run, keep):
    """Keep the newest checkpoints; AdamW's state only in the newest."""
    for age, ckpt in enumerate(sorted(run.dir.glob(STEP_FOLDER), reverse=True)):
        if age >= keep:
            hidden = ckpt.with_name(f".tmp-{ckpt.name}")  # a checkpoint is whole, or it has another name
            shutil.rmtree(ckpt.replace(hidden))
        elif age > 0:
            (ckpt / "optimizer.safetensors").unlink(missing_ok=True)


def resume_point(cfg, given, folder):
    """(cfg, checkpoint, step, bytes of the log) to go on from. cfg decides only on what is free."""
    state = max(folder.glob(f"{STEP_FOLDER}/train.json"), default=None)
    if not (cfg.resume and state):
        return cfg, None, 0, 0
    ckpt = state.parent
    match read_state(ckpt):
        case {"step": int(step), "logged": int(logged), "config": saved} if (
                min(step, logged) >= 0 and saved.keys() == FIELDS.keys()):
            kept = {k: v for k, v in saved.items() if not FIELDS[k].metadata.get("free")}
        case _:
            raise ValueError(f"{state}: broken or of another version; it can be --init, but not --resume")
    for k, v in kept.items():
        if given.get(k, v) != v:
            raise ValueError(f"--{k} {given[k]}: --resume goes on with a run that has --{k} {v} ({folder})")
    return replace(cfg, **kept, init=cfg.init if "init" in given else saved["init"]), ckpt, step, logged


def take_folder(run, lock, logged):
    """Lock the run's folder, and clear what others left there beyond the point where this run begins."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{run.dir}: another run writes there (give another --out_dir)") from None
    if run.resumed and max(run.dir.glob(f"{STEP_FOLDER}/train.json")).parent != run.resumed:
        raise ValueError(f"{run.dir}: another run has written there meanwhile; start again")
    for leftover in run.dir.glob(".tmp-*"):
        shutil.rmtree(leftover)
    tidy(run, run.cfg.keep if run.resumed else 0)
    with open(run.dir / "metrics.jsonl", "ab") as log:
        log.truncate(min(log.tell(), logged))


@contextmanager
def begin(cfg, name, given):
    """The Run of a stage, new or resumed, alone in its folder until the `with` block ends. A new run replaces
    an earlier one there once its settings have proved right."""
    cfg, ckpt, step, logged = resume_point(cfg, given, Path(cfg.out_dir, name))
    run = Run(cfg, name, ckpt, step)
    if not ckpt and cfg.init and Path(cfg.init).resolve().is_relative_to(run.dir.resolve()):
        raise ValueError(f"--init {cfg.init}: this run would replace {run.dir} (give another --out_dir)")
    size = "questions_per_step" if name == "rl" else "batch_size"
    if run.world > getattr(cfg, size):
        raise ValueError(f"--{size} {getattr(cfg, size)} is smaller than the number of processes {run.world}")
    run.model, run.tokenizer = build(replace(cfg, init=str(ckpt)) if ckpt else cfg, run)
    for llama in run.model.llamas():
        llama.activation_checkpointing = run.repeats
        if run.compile:
            llama.compile_blocks()
    run.train, run.valid = read_data(run, "train"), read_data(run, "valid")[:cfg.eval_size]
    run.dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.dir, os.O_RDONLY)  # the system unlocks however the process ends
    before = {number: signal.signal(number, run.ask_to_stop) for number in SIGNALS}
    try:
        if run.main:
            take_folder(run, lock, logged)
        if cfg.resume:
            run.say(f"resumed at step {step} ({ckpt or 'no checkpoint'})")
        yield run
        if run.signal:  # it came while the last checkpoint was written
            raise SystemExit(128 + run.signal)
    finally:
        os.close(lock)
        for number, handler in before.items():
            signal.signal(number, handler)


def finish_step(run, optimizer, figures, stage, end, total):
    """Log, validate and save where it is due. SystemExit, 128 + signal, where one asked the run to stop."""
    run.step = step = run.step + 1
    if step % run.cfg.log_every == 0 or step == total:
        figures = run.mean(figures)
        run.log(step=step, stage=stage, **figures)
        run.bar.set_postfix([*figures.items()][:4])  # as many as fit in a line
    if step == end or (run.cfg.eval_every and step % run.cfg.eval_every == 0):
        validate(run, stage)
    stop = run.asked_to_stop()
    if run.main and (stop or step == total or step % run.cfg.save_every == 0):
        save_checkpoint(run, optimizer)
    if stop:
        run.say(f"stopped at step {step}; the same command with --resume goes on")
        raise SystemExit(128 + (run.signal or signal.SIGINT))


def validate(run, stage):
    """Log greedy figures on validation questions, a share on each process."""
    if run.model.config.latent and stage == 0:  # it still writes text: there is nothing to measure
        return
    mine = run.valid[run.rank::run.world]
    figures, _ = evaluate(run.model, run.tokenizer, mine, max_answer=run.cfg.max_answer, bf16=run.bf16)
    share = len(mine) * run.world / len(run.valid)
    figures = run.mean({k: v * share for k, v in figures.items() if k != "n"})
    run.model.train()
    run.log(step=run.step, stage=stage, valid=figures)
    shown = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
    run.say(f"step {run.step} stage {stage}: validation {shown}")


# --- supervised stage (paper, section 3.2) ---

def curriculum(cfg, latent, n):
    """[(stage, its first step, its last + 1)]: at stage s the first s steps are latent; 0 is text."""
    epochs = [cfg.cot_epochs, *[cfg.epochs_per_stage] * cfg.max_steps]
    epochs[-1] += cfg.final_epochs
    epochs = epochs if latent else [sum(epochs)]
    steps = {s: max(1, round(e * n / cfg.batch_size)) for s, e in enumerate(epochs) if e > 0}
    ends = np.cumsum([0, *steps.values()]).tolist()
    if cfg.max_iters:
        ends = [end * cfg.max_iters // ends[-1] for end in ends]
    return [(s, a, b) for s, a, b in zip(steps, ends, ends[1:]) if b > a]


def sft_noise(run, rows, stage, step):
    """Of the latents of a global batch of so many rows; None where nothing is sampled."""
    cfg, d = run.cfg, run.model.policy.config.hidden_size
    shape = rows, min(stage + 1, cfg.max_steps), cfg.thoughts_per_step, d
    sampled = run.model.config.vae and stage > 0
    return torch.randn(shape, generator=generator(cfg.seed, SFT_NOISE, step)) if sampled else None


def micro_batches(run, examples, stage, noise):
    """This process's parts of a global batch, as Batches on the CPU."""
    config = run.model.config
    tokens = sum(len(remaining_text(e, config, stage)) for e in examples)
    # rows of like length go together: less padding, the same batch
    order = np.argsort([len(e) for e in examples], kind="stable")
    count = -(-len(examples) // (run.micro_batch * run.world))
    for rows in np.array_split(order, min(count, len(examples) // run.world)):
        rows = rows[run.rank::run.world]
        part = None if noise is None else noise[rows]
        yield collate([examples[i] for i in rows], config, stage, part, len(examples), tokens)


def fit_micro_batch(run, stage):
    """Set run.micro_batch: with --micro_batch 0, as many of the longest examples as a GPU can train on."""
    cfg, model, run.micro_batch = run.cfg, run.model, run.cfg.micro_batch or 32
    if cfg.micro_batch or not run.gpu:
        return
    size = -(-cfg.batch_size // run.world)  # a process's share of a batch
    longest = (sorted(run.train, key=len)[-size:] * size)[-size:]
    held = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]  # AdamW's
    while True:
        batch = collate(longest, model.config, stage, sft_noise(run, len(longest), stage, 0))
        try:  # a second micro-batch, or any under DDP, finds gradients in memory
            for _ in range(1 if len(longest) == size and run.world == 1 else 2):
                with run.autocast():
                    losses = model(moved(batch, run.device))
                sum(losses.values()).backward()
            break
        except torch.OutOfMemoryError:
            if len(longest) == 1:
                raise ValueError("--micro_batch 0: not even one example fits on the device") from None
            longest = longest[-len(longest) // 2:]
        finally:
            losses = None
            model.zero_grad()
            torch.cuda.empty_cache()
    del held
    size = torch.tensor(len(longest), device=run.device)
    if run.world > 1:
        dist.all_reduce(size, dist.ReduceOp.MIN)
    run.micro_batch = int(size)
    run.say(f"stage {stage} takes {run.micro_batch} rows at once (--micro_batch 0)")


def train_supervised(cfg, name, given):
    """Curriculum from text to latents (or text alone). The trained checkpoint is in out_dir/name."""
    with begin(cfg, name, given) as run:
        cfg, model, optimizer = run.cfg, run.model, None
        # epochs count imitated questions: every method, nocot too, makes as many steps
        stages = curriculum(cfg, model.config.latent, min(len(run.train), cfg.annotated or len(run.train)))
        lengths, total = {s: b - a for s, a, b in stages}, stages[-1][2]
        text_steps, size = lengths.get(0, 0), sum(p.numel() for p in model.policy.parameters())
        run.say(f"{cfg.method}, {size / 1e6:.2f} M parameters, {len(run.train)} examples, {total} steps of "
                f"{cfg.batch_size} (of each stage: {lengths})")
        weights = {"answer": 1.0, "stop": 1.0, "decode": cfg.decode_coef, "kl": cfg.beta_kl}
        for step in run.steps(total):
            stage, opening, end = next(s for s in stages if step < s[2])
            if step == text_steps > 0 and model.decoder is not None:
                model.decoder.load_state_dict(model.policy.state_dict())  # it starts as the warmed up policy
            if optimizer is None or step == opening:  # AdamW is made anew in each stage
                optimizer = ddp = None  # the last stage's averages and buckets make room
                gc.collect()
                model.set_trainable(stage)
                fit_micro_batch(run, stage)
                ckpt = run.resumed if step > opening else None
                optimizer = make_optimizer(model, cfg, cfg.weight_decay, ckpt)
                ddp = run.wrap(model.train())
                noise = sft_noise(run, cfg.batch_size, stage, step)
            examples = [run.train[i] for i in batch_indices(cfg.seed, step, len(run.train), cfg.batch_size)]
            batches, parts = list(micro_batches(run, examples, stage, noise)), {}
            for i, batch in enumerate(batches):
                with run.no_sync(ddp, i + 1 < len(batches)):
                    with run.autocast():
                        losses = ddp(moved(batch, run.device))
                    loss = sum(weights[k] * v for k, v in losses.items())
                    (loss * run.world).backward()  # DDP takes the mean; the losses are shares of a sum
                parts = {k: parts.get(k, 0.0) + v.detach() * run.world for k, v in losses.items()}
            # while a GPU is still busy: at 1B this takes 60 ms
            noise = sft_noise(run, cfg.batch_size, stage, step + 1)
            norm = run.clip_gradients(optimizer, cfg.clip)
            # one cosine over the text stage, another over all latent stages, a warm-up for each optimizer
            progress = (step - text_steps) / (total - text_steps) if stage else step / text_steps
            lr = set_lr(optimizer, cfg.lr if stage else cfg.cot_lr, cfg.min_lr, progress,
                        (step - opening + 1) / max(1, cfg.warmup))
            optimizer.step()
            optimizer.zero_grad()
            finish_step(run, optimizer, parts | {"grad_norm": norm, "lr": lr}, stage, end, total)


# --- reinforcement learning (paper, section 3.3) ---

def train_rl(cfg, given):
    """GRPO on questions and answers, from checkpoint cfg.init. The trained checkpoint is in out_dir/rl."""
    with begin(cfg, "rl", given) as run:
        cfg, model = run.cfg, run.model
        Q, G = cfg.questions_per_step, cfg.group
        total = min(cfg.rl_iters or max(1, len(run.train) // Q), cfg.max_iters or math.inf)
        model.set_trainable("rl")
        optimizer = make_optimizer(model, cfg, 0.0, run.resumed)
        ddp = run.wrap(LogProbs(model, cfg.latent_grad))
        reference = None
        if cfg.kl_coef:  # from the policy that RL began with: a resumed run reads --init again
            start, _ = build(replace(cfg, decode="no", w_coh=0.0), run)  # no decoder, nor a reward for it
            if run.compile:
                start.policy.compile_blocks()
            reference = LogProbs(start.requires_grad_(False), cfg.latent_grad)
        run.say(f"{total} batches of {Q} questions x {G} rollouts, {Q * G // cfg.minibatch} "
                f"optimizer steps each, from {cfg.init}")
        if run.step == 0:
            validate(run, "rl")  # what RL has to improve on
        order = cfg.seed + (RL_ORDER << 32)  # another than that of the supervised stage
        for step in run.steps(total):
            lr = set_lr(optimizer, cfg.rl_lr, cfg.rl_min_lr, step / total, (step + 1) / max(1, cfg.rl_warmup))
            examples = [run.train[i] for i in batch_indices(order, step, len(run.train), Q)]
            stats = rl_step(run, ddp, reference, optimizer, examples)
            finish_step(run, optimizer, stats | {"lr": lr}, "rl", total, total)


# --- main ---

def report(cfg, runs):
    """Print the table of {label: run's folder} on the task's test sets, or what was held out of a file."""
    sets = TEST_SETS if cfg.data == "builtin" else (cfg.data,)
    split = "test" if cfg.data in (*BUILTIN, *DATASETS) else "valid"
    evaluate_runs(runs.items(), sets, split, cfg.data_dir, cfg.device, cfg.dtype, cfg.compile)


def reuse_memory():
    """Keep freed large blocks: to clear new ones takes a sixth of a CPU step."""
    if sys.platform == "linux":
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


def main(argv=None):
    given = parse(argv)
    cfg = resolve(given)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    reuse_memory()
    joins = "RANK" in os.environ and not dist.is_initialized()  # started by torchrun
    if joins:
        gpu = device_of(cfg.device).type == "cuda"
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the longest that processes wait for one another: rank 0 writes a checkpoint of 30 GB alone
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(minutes=60))
    if cfg.stage == "all":
        train_all(cfg, given)
    elif cfg.stage == "rl":
        train_rl(cfg, given)
    else:
        train_supervised(cfg, cfg.stage, given)
    if joins:  # after an error it could wait for processes that are gone
        gc.collect()  # DDP's cycles would keep its threads alive beyond the interpreter
        dist.destroy_process_group()


def train_all(cfg, given):
    """The default job: the stages in turn, and their table."""
    out, runs = Path(cfg.out_dir), {}
    if cfg.method == "atp" and cfg.baseline:
        steps = min(cfg.baseline, cfg.max_iters or cfg.baseline)
        own = {"method": "nocot", "max_iters": steps, "vae": "auto", "stop": "auto", "decode": "auto"}
        train_supervised(replace(cfg, **own), "nocot", given | own)
        runs["answer only (nocot)"] = out / "nocot"
    train_supervised(cfg, "vae", given)
    runs["latents, imitation (vae)" if cfg.method == "atp" else cfg.method] = out / "vae"
    if cfg.method == "atp":
        if dist.is_initialized():
            dist.barrier()  # the checkpoint is there for every process
        train_rl(resolve({**given, "init": str(out / "vae")}), given)
        runs["latents, active planning (rl)"] = out / "rl"
    if not dist.is_initialized() or dist.get_rank() == 0:
        report(cfg, runs)


if __name__ == "__main__":
    cli(main)
