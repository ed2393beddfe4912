"""Train ATP-Latent and its baselines.

    python train.py                                        small model, built-in task, from nothing, on a CPU:
                                                           answer-only, supervised, RL, and their evaluation
    python train.py --stage vae --init DIR --data gsm8k    one stage, from a Hugging Face LLaMA
    torchrun --nproc_per_node=8 train.py --stage vae ...   the same numbers, faster
    python train.py --stage rl                             from the run that --stage vae left in out/vae

A run's folder in --out_dir has the name of what it trains: vae (atp), simcot, coconut, cot, nocot; rl (atp),
simcot_rl, ... --no-std_norm, --no-... turn off a switch that a preset turns on.
"""

import argparse
import ctypes
import errno
import gc
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
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
from vae import (END, INIT_WEIGHTS, METHODS, PARTS, RL_ORDER, SFT_NOISE, START, LatentConfig, LatentReasoner,
                 collate, device_of, generator, remaining_text, to_device)

try:
    import fcntl
except ImportError:
    raise SystemExit("error: train.py runs on Linux and macOS; this Python has no fcntl") from None


# --- settings ---

def flag(default, note, choices=None, least=0):
    """A field of Config, its text in --help, its choices or its smallest number."""
    return field(default=default, metadata=dict(note=note, choices=choices, least=least))


AUTO = ("auto", "yes", "no")


@dataclass
class Config:
    stage: str = flag("all", "all (vae, rl, evaluation), cot, vae, rl", ("all", "cot", "vae", "rl"))
    method: str = flag("atp", ", ".join(METHODS), METHODS)
    preset: str = flag("builtin", "defaults, as --data or --init ask", ("builtin", "chain", "pretrained"))
    init: str = flag("", "Hugging Face LLaMA, or run or checkpoint of ours (rl: of --method)")
    data: str = flag("builtin", "builtin, chain, gsm8k, gsm8k_aug, or a file")
    data_dir: str = flag("data", "folder of the published files")
    annotated: int = flag(4000, "so many questions show steps (0: all; other data: 0)")
    out_dir: str = flag("out", "folder of the runs")
    resume: bool = flag(False, "go on from the newest checkpoint of the same run")
    seed: int = flag(0, "of weights, data order and samples")
    baseline: int = flag(1200, "stage all: optimizer steps of an answer-only model")
    hidden_size: int = flag(96, "d", least=1)
    layers: int = flag(4, "transformer blocks", least=1)
    heads: int = flag(4, "attention heads", least=1)
    intermediate_size: int = flag(256, "width of the SwiGLU", least=1)
    context: int = flag(256, "longest sequence; longer examples are left out", least=1)
    thoughts_per_step: int = flag(1, "c: latents of a reasoning step", least=1)
    max_steps: int = flag(6, "K: latent reasoning steps (pretrained simcot, coconut: 3)", least=1)
    vae: str = flag("auto", "sample latents, with a KL term (auto: as the method says)", AUTO)
    stop: str = flag("auto", "stop head", AUTO)
    decode: str = flag("auto", "decoder and its loss", AUTO)
    batch_size: int = flag(32, "examples of an optimizer step, on all processes", least=1)
    micro_batch: int = flag(128, "most rows of one pass", least=1)
    cot_epochs: float = flag(12.0, "stage 0: text chain of thought")
    epochs_per_stage: float = flag(1.2, "each further stage (pretrained simcot, coconut: 3)")
    final_epochs: float = flag(9.6, "further epochs, all steps latent (these: 16)")
    max_iters: int = flag(0, "scale the curriculum to so many optimizer steps (rl: cut)")
    cot_lr: float = flag(2e-3, "peak learning rate of stage 0")
    lr: float = flag(1.5e-3, "peak learning rate of the latent stages")
    min_lr: float = flag(0.02, "the cosine ends at this share of the peak (1: constant)")
    warmup: int = flag(50, "optimizer steps of warm-up, in each stage")
    weight_decay: float = flag(0.4, "AdamW")
    decay_all: bool = flag(False, "decay norms and biases too")
    beta2: float = flag(0.98, "AdamW")
    grad_clip: float = flag(1.0, "of the gradient norm (0: none)")
    beta_kl: float = flag(1e-3, "weight of the KL term")
    decode_coef: float = flag(1.0, "weight of the decoder loss (1: the paper's sum over tokens)")
    rl_lr: float = flag(2e-4, "peak learning rate")
    rl_min_lr: float = flag(0.0, "as --min_lr")
    rl_warmup: int = flag(10, "batches of warm-up")
    rl_grad_clip: float = flag(1.0, "as --grad_clip")
    rl_iters: int = flag(280, "batches of questions (0: one epoch)")
    questions_per_step: int = flag(64, "questions of a batch, on all processes", least=1)
    group: int = flag(8, "rollouts of a question", least=2)
    minibatch: int = flag(512, "rollouts of an optimizer step, on all processes", least=1)
    w_acc: float = flag(1.0, "reward of a right answer (0: coherence only, no labels)")
    w_fmt: float = flag(0.5, "reward of a well-formed answer")
    w_coh: float = flag(0.1, "reward of coherence")
    ratio_clip: float = flag(0.2, "PPO")
    std_norm: bool = flag(False, "divide advantages by the group's deviation")
    latent_grad: str = flag("path", "path, score", ("path", "score"))
    latent_coef: float = flag(1.0, "weight of the terms of latents and stops")
    latent_mean: bool = flag(False, "score: density averaged, not summed, over d")
    kl_coef: float = flag(0.0, "weight of the KL from the policy that RL began with")
    max_answer: int = flag(16, "most answer tokens of a rollout", least=1)
    eval_every: int = flag(250, "steps between validations (0: only at the end)")
    eval_size: int = flag(256, "validation questions", least=1)
    log_every: int = flag(10, "steps between lines of metrics.jsonl", least=1)
    save_every: int = flag(500, "steps between checkpoints", least=1)
    keep: int = flag(2, "checkpoints kept", least=1)
    device: str = flag("auto", "auto, cpu, cuda", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "autocast (auto: on a GPU, not for score)", ("auto", "float32", "bfloat16"))
    compile: str = flag("auto", "torch.compile of the blocks (auto: on a GPU)", AUTO)
    activation_checkpointing: str = flag("auto", "of wide passes (auto: on a GPU)", AUTO)
    threads: int = flag(0, "CPU threads (0: torch's choice)")

    def __post_init__(self):
        """ValueError for a value out of range, naming the flag."""
        for f in fields(self):
            value, choices, least = getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            kinds = (int, float) if f.type is float else (f.type,)
            wrong = type(value) not in kinds or (choices and value not in choices)
            if wrong or (f.type in (int, float) and not least <= value < math.inf):
                raise ValueError(f"--{f.name} cannot be {value!r}")
        if self.stage == "cot" and self.method != "cot":
            raise ValueError(f"--stage cot is --method cot: leave --method {self.method} out")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"--hidden_size {self.hidden_size}: no multiple of twice --heads {self.heads}")
        if not self.cot_epochs + self.epochs_per_stage + self.final_epochs:
            raise ValueError("--cot_epochs, --epochs_per_stage and --final_epochs leave no step")
        Q, G = self.questions_per_step, self.group
        if self.minibatch % Q or Q * G % self.minibatch:
            raise ValueError(f"--minibatch {self.minibatch}: with --questions_per_step {Q}, --group {G} it "
                             f"is {Q} x a divisor of {G}, as {Q * G}")
        if self.thoughts_per_step * self.max_steps >= self.context:
            raise ValueError("--thoughts_per_step times --max_steps leaves no room in --context")


FIELDS = {f.name: f for f in fields(Config)}
SECTIONS = {"stage": "run", "hidden_size": "model from nothing", "thoughts_per_step": "latent reasoning",
            "batch_size": "supervised stage", "rl_lr": "reinforcement learning", "eval_every": "running"}
PRESETS = {
    "pretrained": dict(  # the paper's recipe, as its released code has it
        preset="pretrained", data="gsm8k_aug", annotated=0, baseline=0, context=512, thoughts_per_step=2,
        max_steps=10, batch_size=256, micro_batch=32, cot_epochs=0.0, epochs_per_stage=2.0, final_epochs=5.0,
        cot_lr=1e-4, lr=1e-4, min_lr=1.0, warmup=0, weight_decay=0.01, decay_all=True, beta2=0.999,
        grad_clip=0.0, rl_lr=1e-6, rl_min_lr=1.0, rl_warmup=0, rl_iters=0, questions_per_step=16,
        minibatch=16, std_norm=True, latent_grad="score", eval_every=1000, save_every=1000),
    "chain": dict(preset="chain", data="chain", annotated=0, baseline=5000, cot_epochs=1.2,
                  epochs_per_stage=0.1, final_epochs=2.2)}
# pretrained SIM-CoT and Coconut, as released, in as many epochs as the rest
THREE_STEPS = dict(max_steps=3, epochs_per_stage=3.0, final_epochs=16.0)
COMMAND = {"stage", "init", "out_dir", "resume", "baseline", "device", "compile", "threads"}
# what a resumed run may change, and what a new run does not take over from --init's checkpoint
RESUMABLE = COMMAND | {"micro_batch", "log_every", "save_every", "keep", "activation_checkpointing"}
NOT_INHERITED = COMMAND | {"seed", "max_iters", "dtype"}


def help_text():
    text = f"{__doc__}\n  {'setting':<27}{'default':>9}{'chain':>7}{'pretrained':>12}\n"
    for name, f in FIELDS.items():
        text += f"{SECTIONS[name]}:\n" if name in SECTIONS else ""
        chain, pretrained = (str(PRESETS[preset].get(name, "")) for preset in ("chain", "pretrained"))
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
    given = vars(parser.parse_args(argv))
    return {name: os.path.expanduser(v) if isinstance(v, str) else v for name, v in given.items()}  # ~/runs


def run_name(kind, method):
    """The folder of a run. kind: "rl", else supervised."""
    name = "vae" if method == "atp" else method
    return name if kind != "rl" else "rl" if method == "atp" else f"{method}_rl"


def newest(folder):
    """The newest checkpoint in a run's folder, or None."""
    return max((file.parent for file in Path(folder).glob(f"{STEP_FOLDER}/train.json")), default=None)


def starting_point(given):
    """(folder of weights, settings of the run that made it, {} of a Hugging Face LLaMA)."""
    init, method = given.get("init", ""), given.get("method", Config.method)
    if given.get("stage") == "rl" and not init:
        own, start = (Path(given.get("out_dir", Config.out_dir), run_name(k, method)) for k in ("rl", "vae"))
        init = own if given.get("resume") and newest(own) else start  # to resume, its own checkpoint will do
    if not init or Path(init, "config.json").is_file() and not Path(init, "train.json").is_file():
        return init, {}
    try:
        ckpt = find_checkpoint(init)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--init {init}: no run of train.py, and no folder with config.json of a downloaded model (as "
            "`hf download meta-llama/Llama-3.2-1B-Instruct --local-dir FOLDER` makes it)") from None
    return str(ckpt), read_state(ckpt)["config"]


def resolve(given):
    """The Config of a run: defaults, then those of its preset or the settings of --init's run, then flags."""
    stage, data = given.get("stage"), given.get("data", Config.data)
    init, saved = starting_point(given)
    method = "cot" if stage == "cot" else Config.method
    if saved and stage != "cot" and (stage == "rl" or saved["method"] != "cot"):  # or text was the warm-up
        method = saved["method"]
    method = given.get("method", method)
    usual = "pretrained" if init else "chain" if data == "chain" else Config.preset
    preset = given.get("preset", saved.get("preset", usual))
    values = PRESETS.get(preset, {})
    if preset == "pretrained" and method in ("simcot", "coconut"):
        values = values | THREE_STEPS
    if saved:
        own = {k: v for k, v in saved.items() if k in FIELDS and k not in NOT_INHERITED} | {"baseline": 0}
        if method != saved["method"]:  # it has its own number of reasoning steps, and needs no text again
            own |= {k: values[k] for k in THREE_STEPS if k in values}
            own |= {"cot_epochs": 0.0} if METHODS[method]["latent"] and saved["method"] != "nocot" else {}
        values = own if "preset" not in given else own | values
    if data not in ("builtin", values.get("data")):
        values = values | {"annotated": 0}  # the default is builtin's
    return Config(**{**values, **given, "method": method, "init": init})


# --- set-up ---

ASK_TO_STOP = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
    ASK_TO_STOP.remove(signal.SIGHUP)


class Run:
    """What a stage works with: settings, processes, device, folder, log; from load() on model and data.
    kind: "rl", else supervised. resumed: the checkpoint that it goes on from, after `step` steps."""

    def __init__(self, cfg, kind, resumed=None, step=0):
        self.cfg, self.rl, self.resumed, self.step = cfg, kind == "rl", resumed, step
        self.name, self.dir = run_name(kind, cfg.method), Path(cfg.out_dir, run_name(kind, cfg.method))
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.main, self.device = self.rank == 0, device_of(cfg.device)
        self.gpu = self.device.type == "cuda"
        on = {"auto": self.gpu, "yes": True, "no": False, "bfloat16": True, "float32": False}
        self.compile, self.activation_checkpointing = on[cfg.compile], on[cfg.activation_checkpointing]
        # a density is a sum over d, in which bfloat16 or TF32 would move every ratio out of the clip
        exact = self.rl and cfg.latent_grad == "score" and cfg.dtype == "auto"
        self.bf16 = on[cfg.dtype] and not exact
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, self.bf16)
        torch.set_float32_matmul_precision("highest" if exact or cfg.dtype == "float32" else "high")
        self.began, self.signal = time.time(), 0  # signal: the number of one that asks the run to stop
        self.model = self.tokenizer = self.train = self.valid = self.checksum = self.bar = None

    def load(self):
        self.model, self.tokenizer = build(replace(self.cfg, init=str(self.resumed or self.cfg.init)), self)
        for llama in self.model.llamas():
            llama.activation_checkpointing = self.activation_checkpointing
            if self.compile:
                llama.compile_blocks()
        self.train, self.valid = read_data(self, "train"), read_data(self, "valid")[:self.cfg.eval_size]
        self.checksum = 0  # of the training data, which a resumed run must find unchanged
        for e in self.train:
            self.checksum = zlib.crc32(repr((e.question, e.steps, e.answer)).encode(), self.checksum)

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

    def log(self, stage, **values):
        """A line of metrics.jsonl, with seconds since the start and the GPU's peak in GiB."""
        if "lr" in values:
            self.bar.set_postfix([*values.items()][:4])  # as many as fit in a line
        values = dict(step=self.step, stage=stage, **values, seconds=round(time.time() - self.began, 2))
        if self.gpu:
            values["memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if self.main:
            with open(self.dir / "metrics.jsonl", "a") as f:
                f.write(json.dumps(values) + "\n")

    def say(self, text):
        """A line on stdout. Where nobody reads it any more (`| head`) the run goes on."""
        if self.main:
            try:
                tqdm.write(f"{self.name}: {text}")
                sys.stdout.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def steps(self, first, last):
        """The steps that are still to be made, as a bar where there is a terminal."""
        steps, disable = range(max(first, self.step), last), None if self.main else True
        self.bar = tqdm(steps, self.name, last, initial=steps.start, disable=disable)
        return self.bar

    def clip_gradients(self, optimizer, limit):
        """The gradient norm before clipping; FloatingPointError where it is not finite."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(params, limit or math.inf))
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {self.step + 1}: the gradient norm is {norm}; "
                                     "the last checkpoint stands")
        return norm

    def ask_to_stop(self, number, _):
        """The step ends and a checkpoint is written. A second Ctrl-C or SIGTERM stops at once."""
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
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
    """Model and tokenizer that cfg asks for. Of a checkpoint with other heads, or another decoder, only the
    policy is kept; RL refuses it."""
    torch.manual_seed(generator(cfg.seed, INIT_WEIGHTS).initial_seed())
    init, model, tokenizer = cfg.init, None, Tokenizer.from_pretrained(cfg.init or ASSETS)
    asked = {part: getattr(cfg, part) == "yes" for part in PARTS if getattr(cfg, part, "auto") != "auto"}
    parts = METHODS[cfg.method] | asked
    new_tokens = START not in tokenizer.special
    start, end = tokenizer.add_special(START, END)
    config = LatentConfig(**parts, method=cfg.method, max_steps=cfg.max_steps, start_id=start, end_id=end,
                          thoughts_per_step=cfg.thoughts_per_step, eos_id=tokenizer.end_id(),
                          vocab_size=tokenizer.vocab_size)
    if init and Path(init, "latent.json").is_file():
        model = LatentReasoner.from_pretrained(init, device=run.device, decode=parts["decode"])
    fits = model is not None and model.fits(config)
    if run.rl and not (fits and parts["vae"] <= model.config.vae):  # or sigma would be untrained
        raise ValueError(f"--stage rl: {init} has other parts (heads, decoder, VAE) than this run asks for")
    if run.rl and cfg.w_coh and not cfg.w_acc and not parts["decode"]:
        raise ValueError(f"--w_acc 0 --w_coh {cfg.w_coh}: {init} has no decoder to read plans with")
    if fits:
        model.configure(config)
        return model, tokenizer
    if model:
        run.say(f"{init} has other parts (heads, decoder): only its policy is kept")
        policy = model.policy
    elif init:
        policy = LLaMA.from_pretrained(init, device=run.device)
    else:
        policy = LLaMA(LLaMAConfig(
            tokenizer.vocab_size, cfg.hidden_size, cfg.intermediate_size, cfg.layers, cfg.heads, cfg.heads,
            cfg.hidden_size // cfg.heads, cfg.context, eos_token_id=tokenizer.eos_id))
    if new_tokens:
        like = tokenizer.encode_ordinary("<<")  # what a reasoning step begins with
        policy.add_tokens([start, end], like[0] if len(like) == 1 else None)
    return LatentReasoner(policy, config).to(run.device), tokenizer


def read_data(run, split):
    """Encoded examples of a split. Imitation takes those that show their steps, at most cfg.annotated; RL,
    validation and answer-only training take all."""
    cfg, data = run.cfg, run.cfg.data
    context = min(cfg.context, run.model.policy.config.max_position_embeddings)
    fits, long = encode_all(load(data, split, cfg.data_dir), run.tokenizer, context)
    imitates = split == "train" and not run.rl and cfg.method != "nocot"
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
        write_json(part / "train.json", {"run": run.name, "step": run.step, "logged": logged,
                                         "data": run.checksum, "saved": time.time(), "config": vars(run.cfg)})
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


def resume_point(cfg, given, name):
    """(cfg, checkpoint, its train.json) to go on from. cfg decides only on what a resumed run may change."""
    ckpt = newest(Path(cfg.out_dir, name)) if cfg.resume else None
    if not ckpt:
        return cfg, None, {"step": 0, "logged": 0}
    match state := read_state(ckpt):
        case {"run": run, "step": int(step), "logged": int(logged), "data": int(), "config": saved} if (
                run == name and min(step, logged) >= 0 and saved.keys() == FIELDS.keys()):
            kept = {k: v for k, v in saved.items() if k not in RESUMABLE}
        case _:
            raise ValueError(f"{ckpt}/train.json: broken or of another run or version; it can only be --init")
    for k, v in kept.items():
        if given.get(k, v) != v:
            raise ValueError(f"--{k} {given[k]}: --resume goes on with a run that has --{k} {v} ({ckpt})")
    return replace(cfg, **kept, init=cfg.init if "init" in given else saved["init"]), ckpt, state


def take_folder(run, lock, logged):
    """Lock the run's folder, and clear what others left there beyond the point where this run begins."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{run.dir}: another run writes there (give another --out_dir)") from None
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        run.say(f"warning: no locks on the disk of {run.dir}: let no other run write there")
    ckpt = newest(run.dir)
    if run.resumed and ckpt != run.resumed:
        raise ValueError(f"{run.dir}: another run has written there meanwhile; start again")
    if ckpt and read_state(ckpt).get("run") != run.name:
        raise ValueError(f"{ckpt} is of another run than {run.name}: move it, or give another --out_dir")
    for leftover in run.dir.glob(".tmp-*"):
        shutil.rmtree(leftover)
    tidy(run, run.cfg.keep if run.resumed else 0)
    with open(run.dir / "metrics.jsonl", "ab") as log:
        log.truncate(min(log.tell(), logged))


@contextmanager
def begin(cfg, kind, given):
    """The Run of a stage, new or resumed, alone in its folder until the `with` block ends. A new run replaces
    an earlier one there once its settings have proved right."""
    cfg, ckpt, state = resume_point(cfg, given, run_name(kind, cfg.method))
    run, size = Run(cfg, kind, ckpt, state["step"]), "questions_per_step" if kind == "rl" else "batch_size"
    if not ckpt and cfg.init and Path(cfg.init).resolve().is_relative_to(run.dir.resolve()):
        raise ValueError(f"--init {cfg.init}: this run would replace {run.dir} (give another --out_dir)")
    if run.world > getattr(cfg, size):
        raise ValueError(f"--{size} {getattr(cfg, size)} is smaller than the number of processes {run.world}")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if run.compile and not run.gpu and not shutil.which(compiler):
        raise ValueError(f"--compile yes on a CPU needs a C++ compiler: there is no {compiler}")
    run.load()
    if ckpt and run.checksum != state["data"]:
        raise ValueError(f"--data {cfg.data}: not the training data that {ckpt} was trained on")
    run.dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.dir, os.O_RDONLY)  # the system unlocks however the process ends
    before = {number: signal.signal(number, run.ask_to_stop) for number in ASK_TO_STOP}
    try:
        if run.main:
            take_folder(run, lock, state["logged"])
        if cfg.resume:
            run.say(f"resumed at step {run.step} ({ckpt or 'no checkpoint'})")
        yield run
        if run.signal:  # it came while the last checkpoint was written
            raise SystemExit(128 + run.signal)
    except torch.OutOfMemoryError:
        rows = min(cfg.micro_batch, -(-(cfg.minibatch if run.rl else cfg.batch_size) // run.world))
        raise SystemExit(f"error: out of memory: try --micro_batch {max(1, rows // 2)}") from None
    finally:
        os.close(lock)
        for number, handler in before.items():
            signal.signal(number, handler)


def validate(run, stage):
    """Log greedy figures on validation questions, a share on each process."""
    if run.model.config.latent and stage == 0:  # it still writes text: there is nothing to measure
        return
    mine = run.valid[run.rank::run.world]
    figures, _ = evaluate(run.model, run.tokenizer, mine, max_answer=run.cfg.max_answer, bf16=run.bf16)
    share = len(mine) * run.world / len(run.valid)
    figures = run.mean({k: v * share for k, v in figures.items() if k != "n"})
    run.model.train()
    run.log(stage, valid=figures)
    shown = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
    run.say(f"step {run.step} stage {stage}: validation {shown}")


def save_or_stop(run, optimizer, total):
    """Write a checkpoint where one is due. SystemExit, 128 + signal, where one asked the run to stop."""
    stop = run.asked_to_stop()
    if run.main and (stop or run.step == total or run.step % run.cfg.save_every == 0):
        save_checkpoint(run, optimizer)
    if stop:
        run.say(f"stopped at step {run.step}; the same command with --resume goes on")
        raise SystemExit(128 + (run.signal or signal.SIGINT))


# --- supervised stage (paper, section 3.2) ---

def curriculum(cfg, latent, n):
    """[(stage, its first step, its last + 1)]. At stage s the first min(s, K) reasoning steps are latent, the
    others text; stage K + 1 leaves these out."""
    epochs = [cfg.cot_epochs, *[cfg.epochs_per_stage] * cfg.max_steps, cfg.final_epochs]
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
    count = -(-len(examples) // (run.cfg.micro_batch * run.world))
    for rows in np.array_split(order, min(count, len(examples) // run.world)):
        rows = rows[run.rank::run.world]
        part = None if noise is None else noise[rows]
        yield collate([examples[i] for i in rows], config, stage, part, len(examples), tokens)


def train_supervised(cfg, given):
    """Curriculum from text to latents (or text alone). The trained checkpoint is in the run's folder."""
    with begin(cfg, "vae", given) as run:
        cfg, model, optimizer, ddp = run.cfg, run.model, None, None
        # epochs count imitated questions: every method, nocot too, makes as many optimizer steps
        stages = curriculum(cfg, model.config.latent, min(len(run.train), cfg.annotated or len(run.train)))
        lengths, total = {s: b - a for s, a, b in stages}, stages[-1][2]
        text_steps, size = lengths.get(0, 0), sum(p.numel() for p in model.policy.parameters())
        run.say(f"{cfg.method}, {size / 1e6:.2f} M parameters, {len(run.train)} examples, {total} steps of "
                f"{cfg.batch_size} (of each stage: {lengths})")
        weights = {"answer": 1.0, "stop": 1.0, "decode": cfg.decode_coef, "kl": cfg.beta_kl}
        for stage, first, last in stages:
            if run.step >= last:  # a resumed run has left it behind
                continue
            if run.step == text_steps > 0 and model.decoder is not None:
                model.decoder.load_state_dict(model.policy.state_dict())  # it starts as the warmed up policy
            optimizer = ddp = None  # AdamW is made anew in each stage; the last one's state makes room
            gc.collect()
            model.set_trainable(latents=stage > 0)
            ckpt = run.resumed if run.step > first else None
            optimizer = make_optimizer(model, cfg, cfg.weight_decay, ckpt)
            ddp = run.wrap(model.train())
            noise = sft_noise(run, cfg.batch_size, stage, run.step)
            for step in run.steps(first, last):
                indices = batch_indices(cfg.seed, step, len(run.train), cfg.batch_size)
                batches = list(micro_batches(run, [run.train[i] for i in indices], stage, noise))
                parts = {}
                for i, batch in enumerate(batches):
                    with run.no_sync(ddp, i + 1 < len(batches)):
                        with run.autocast():
                            losses = ddp(to_device(batch, run.device))
                        loss = sum(weights[k] * v for k, v in losses.items())
                        (loss * run.world).backward()  # DDP takes the mean; the losses are shares of a sum
                    parts = {k: parts.get(k, 0.0) + v.detach() * run.world for k, v in losses.items()}
                # while a GPU is still busy: at 1B this takes 60 ms
                noise = sft_noise(run, cfg.batch_size, stage, step + 1)
                norm = run.clip_gradients(optimizer, cfg.grad_clip)
                # one cosine over the text stage, another over all latent stages, a warm-up for each optimizer
                progress = (step - text_steps) / (total - text_steps) if stage else step / text_steps
                lr = set_lr(optimizer, cfg.lr if stage else cfg.cot_lr, cfg.min_lr, progress,
                            (step - first + 1) / max(1, cfg.warmup))
                optimizer.step()
                optimizer.zero_grad()
                run.step = step + 1
                if run.step % cfg.log_every == 0 or run.step == total:
                    run.log(stage, **run.mean(parts | {"grad_norm": norm, "lr": lr}))
                if run.step == last or (cfg.eval_every and run.step % cfg.eval_every == 0):
                    validate(run, stage)
                save_or_stop(run, optimizer, total)


# --- reinforcement learning (paper, section 3.3) ---

def train_rl(cfg, given):
    """GRPO on questions and answers, from checkpoint cfg.init. A step is a batch of questions."""
    with begin(cfg, "rl", given) as run:
        cfg, model = run.cfg, run.model
        Q, G = cfg.questions_per_step, cfg.group
        total = min(cfg.rl_iters or max(1, len(run.train) // Q), cfg.max_iters or math.inf)
        model.set_trainable(decoder=False)
        optimizer = make_optimizer(model, cfg, 0.0, run.resumed)
        ddp = run.wrap(LogProbs(model, cfg.latent_grad))
        reference = None
        if cfg.kl_coef:  # from the policy that RL began with: a resumed run reads --init again
            if not Path(cfg.init).is_dir():
                raise FileNotFoundError(f"--kl_coef needs {cfg.init}, which is gone (--init: its new place)")
            start, _ = build(replace(cfg, decode="no", w_coh=0.0), run)  # no decoder, nor a reward for it
            if run.compile:
                start.policy.compile_blocks()
            reference = LogProbs(start.requires_grad_(False), cfg.latent_grad)
        run.say(f"{total} batches of {Q} questions x {G} rollouts, {Q * G // cfg.minibatch} "
                f"optimizer steps each, from {cfg.init}")
        if run.step == 0:
            validate(run, "rl")  # what RL has to improve on
        order = cfg.seed + (RL_ORDER << 32)  # another than that of the supervised stage
        for step in run.steps(0, total):
            examples = [run.train[i] for i in batch_indices(order, step, len(run.train), Q)]
            lr = set_lr(optimizer, cfg.rl_lr, cfg.rl_min_lr, step / total, (step + 1) / max(1, cfg.rl_warmup))
            # rollouts, rewards, advantages; then of each minibatch forward, backward, clip, optimizer step
            figures = rl_step(run, ddp, reference, optimizer, examples)
            run.step = step + 1
            if run.step % cfg.log_every == 0 or run.step == total:
                run.log("rl", **run.mean(figures | {"lr": lr}))
            if run.step == total or (cfg.eval_every and run.step % cfg.eval_every == 0):
                validate(run, "rl")
            save_or_stop(run, optimizer, total)


# --- main ---

def report(cfg, runs):
    """Print the table of [(label, run's folder)] on the task's test sets, or what was held out of a file."""
    sets = TEST_SETS if cfg.data == "builtin" else (cfg.data,)
    split = "test" if cfg.data in (*BUILTIN, *DATASETS) else "valid"
    evaluate_runs(runs, sets, split, cfg.data_dir, cfg.device, cfg.dtype, cfg.compile)


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
    {"all": train_all, "rl": train_rl}.get(cfg.stage, train_supervised)(cfg, given)
    if joins:  # after an error it could wait for processes that are gone
        gc.collect()  # DDP's cycles would keep its threads alive beyond the interpreter
        dist.destroy_process_group()


def train_all(cfg, given):
    """The default job: the stages in turn, and their table."""
    out, start, runs = Path(cfg.out_dir), Path(cfg.out_dir, run_name("vae", cfg.method)), []
    if cfg.method == "atp" and cfg.baseline:
        steps = min(cfg.baseline, cfg.max_iters or cfg.baseline)
        own = {"method": "nocot", "max_iters": steps, "vae": "auto", "stop": "auto", "decode": "auto"}
        train_supervised(replace(cfg, **own), given | own)
        runs.append(("answer only (nocot)", out / "nocot"))
    train_supervised(cfg, given)
    runs.append(("latents, imitation (vae)" if cfg.method == "atp" else cfg.method, start))
    if cfg.method == "atp":
        if dist.is_initialized():
            dist.barrier()  # the checkpoint is there for every process
        train_rl(resolve({**given, "init": str(start)}), given)
        runs.append(("latents, active planning (rl)", out / "rl"))
    if not dist.is_initialized() or dist.get_rank() == 0:
        report(cfg, runs)


if __name__ == "__main__":
    cli(main)
