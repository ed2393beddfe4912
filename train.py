"""Train ATP-Latent and its baselines.

    python train.py                                        small model, built-in task, from nothing, on a CPU:
                                                           stages vae, rl, evaluation, and answer-only to compare
    python train.py --stage vae --init DIR --data gsm8k    one stage, from a Hugging Face LLaMA
    torchrun --nproc_per_node=8 train.py --stage vae ...   the same numbers, faster
    python train.py --stage rl                             from the checkpoint that vae left in out/vae

Read in order: settings, set-up, checkpoints, supervised stage, reinforcement learning, main.
"""

import argparse
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before any group: its functions keep the group of that time as their default (see processes)
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from data import BUILTIN, DATASETS, TEST_SETS, Parser, Tokenizer, builtin_tokenizer, encode_all, load
from eval import (check_device, check_vocabulary, evaluate, find_checkpoint, markdown, mean_figures, read_metrics,
                  read_state, run_main)
from model import LLaMA, LLaMAConfig, save_tensors, write_json
from rl import LogProbs, advantages, divergence, objective, score
from vae import END, METHODS, START, LatentConfig, LatentReasoner, Noise, collate, target_tokens


# --- settings ---

@dataclass
class Config:
    stage: str = "all"  # all (vae, rl, evaluation), cot, vae, or rl
    method: str = "atp"  # atp, simcot, coconut, cot, nocot: parts switched off (README)
    init: str = ""  # Hugging Face LLaMA directory, or checkpoint or run folder of ours ("": from nothing; rl: out_dir/vae)
    data: str = "builtin"  # builtin, chain, gsm8k, gsm8k_aug, or a file in one of their formats (5 % of it held out)
    data_dir: str = "data"  # where `python data.py` puts the published files
    annotated: int = 4000  # so many training questions show their steps, to be imitated (0: all; other data: 0)
    out_dir: str = "out"  # runs go to out_dir/vae, out_dir/rl, ...
    resume: bool = False  # go on from the newest checkpoint of the same run
    seed: int = 0  # of weights, data order and samples
    baseline: int = 1200  # stage all: optimizer steps of an answer-only model (nocot), to compare with (0: none)
    # model from nothing (--init "")
    hidden_size: int = 96  # d
    layers: int = 4  # transformer blocks
    heads: int = 4  # attention heads
    intermediate_size: int = 256  # width of the SwiGLU
    context: int = 256  # longest sequence; longer examples are left out, and counted
    # latent reasoning
    thoughts_per_step: int = 1  # c: latents a reasoning step
    max_steps: int = 6  # K: most latent steps
    vae: str = "auto"  # sample latents, with a KL term: auto (as the method says), yes, no
    stop: str = "auto"  # stop head: auto, yes, no
    decode: str = "auto"  # decoder and its loss: auto, yes, no
    # supervised stage
    batch_size: int = 32  # examples an optimizer step, over all processes
    micro_batch: int = 128  # most examples a process takes through the model at once
    cot_epochs: float = 12.0  # stage 0: text chain of thought (warm start)
    epochs_per_stage: float = 1.2  # each further stage makes one more step latent
    final_epochs: float = 9.6  # further epochs with all steps latent
    max_iters: int = 0  # scale the curriculum to so many optimizer steps (rl: cut to so many batches; 0: as epochs, rl_iters)
    cot_lr: float = 2e-3  # peak learning rate of stage 0
    lr: float = 1.5e-3  # peak learning rate of the latent stages
    min_lr: float = 0.02  # the cosine ends at this share of the peak
    warmup: int = 50  # steps of linear warm-up of each new optimizer
    weight_decay: float = 0.4  # AdamW, not on norms and biases
    beta2: float = 0.98  # AdamW
    clip: float = 1.0  # gradient norm
    beta_kl: float = 1e-3  # weight of the KL term
    # reinforcement learning
    rl_lr: float = 2e-4  # peak learning rate
    rl_min_lr: float = 0.0  # the cosine ends at this share of the peak (1: constant)
    rl_warmup: int = 10  # steps of linear warm-up
    rl_iters: int = 280  # batches of questions (0: one epoch)
    questions_per_step: int = 64  # over all processes
    group: int = 8  # rollouts a question
    minibatch: int = 512  # rollouts an optimizer step, over all processes
    w_acc: float = 1.0  # reward of a right answer (0: coherence-only mode, answer labels unused; its other settings: README)
    w_fmt: float = 0.5  # reward of a well-formed answer
    w_coh: float = 0.1  # reward of coherence
    ratio_clip: float = 0.2  # PPO
    std_norm: bool = False  # divide advantages by the group's standard deviation (paper: yes)
    latent_grad: str = "path"  # gradient of latents: path (through z = mu + sigma eps), score (of log N(z; mu, sigma))
    latent_coef: float = 1.0  # weight of the terms of latents and stops (paper: 1; coherence-only mode: 0, with score)
    latent_mean: bool = False  # score: log-density averaged, not summed, over d (paper: summed)
    kl_coef: float = 0.0  # weight of the KL from the policy that RL began with (paper: none)
    temperature: float = 1.0  # of answer tokens in rollouts
    latent_temperature: float = 1.0  # of latents in rollouts: times sigma (paper: 1)
    max_answer: int = 16  # most answer tokens of a rollout
    # running
    eval_every: int = 250  # optimizer steps (rl: batches) between validations (0: only at the end)
    eval_size: int = 256  # validation questions
    log_every: int = 10  # steps between lines of metrics.jsonl
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # autocast: auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16
    compile: str = "auto"  # torch.compile of the blocks: auto (on a GPU), yes, no
    activation_checkpointing: bool = False  # recompute activations in backward: less memory, a third more time
    threads: int = 0  # CPU threads (0: torch's choice)


# The other sets of defaults. --data chain, from nothing: every question shows its steps, so fewer epochs do
CHAIN = dict(baseline=5000, cot_epochs=1.2, epochs_per_stage=0.1, final_epochs=2.2)
# The paper's recipe, where --init is a pretrained LLaMA (paper, sections 4 and 5)
PRETRAINED = dict(
    baseline=0, data="gsm8k_aug", annotated=0, context=512, thoughts_per_step=2, max_steps=10, batch_size=256,
    micro_batch=32, cot_epochs=0.0, epochs_per_stage=2.0, final_epochs=5.0, cot_lr=1e-4, lr=1e-4, min_lr=0.1,
    warmup=100, beta2=0.999, weight_decay=0.01, rl_lr=1e-6, rl_min_lr=1.0, rl_iters=0, questions_per_step=16, minibatch=16,
    std_norm=True, latent_grad="score", eval_every=1000, save_every=1000)

CHOICES = {"stage": ("all", "cot", "vae", "rl"), "method": tuple(METHODS), "device": ("auto", "cpu", "cuda"),
           "dtype": ("auto", "float32", "bfloat16"), "latent_grad": ("path", "score"),
           **{k: ("auto", "yes", "no") for k in ("vae", "stop", "decode", "compile")}}
# settings that belong to the run and not to the model: never taken from the checkpoint that --init names
OWN = ("stage", "baseline", "init", "out_dir", "resume", "seed", "device", "dtype", "compile", "threads", "max_iters")


def comments():
    """The comment behind each field of Config: the text of --help."""
    source = Path(__file__).read_text(encoding="utf-8")
    return dict(re.findall(r"^    (\w+): \w+ = [^#\n]*  # (.+)$", source, re.M))


def parse(argv):
    """The flags that were given, as a dict. One flag a field of Config."""
    p = Parser(description=__doc__.split("\n\nRead")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    help_text = comments()

    def wrong(message):  # run_main prints it, once for all processes
        raise ValueError(f"{message} (see --help)")

    p.error = wrong

    def boolean(text):
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise ValueError
        return text.lower() in ("true", "yes", "1")

    for f in dataclasses.fields(Config):
        note = "".join(f"; {name}: {other[f.name]}" for name, other in (("chain", CHAIN), ("pretrained", PRETRAINED))
                       if f.name in other)
        kind = dict(type=boolean, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        p.add_argument(f"--{f.name}", **kind, choices=CHOICES.get(f.name), default=None,
                       metavar=None if f.name in CHOICES else f.name.upper(),
                       help=f"{help_text[f.name]} [{f.default}{note}]".replace("%", "%%"))
    return {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}


def resolve(given):
    """The Config of a run: defaults, then those for chain, a pretrained init or of the checkpoint continued, then flags."""
    init = given.get("init", "")
    if not init and given.get("stage") == "rl":
        init = str(Path(given.get("out_dir", "out")) / "vae")
    values = {}
    if init:
        if not Path(init).is_dir():
            mend = "" if "init" in given else " (train it with --stage vae first)"
            raise FileNotFoundError(f"--init {init}: no such directory{mend}")
        if not (Path(init) / "config.json").is_file() or (Path(init) / "train.json").is_file():
            init = str(find_checkpoint(init))
            saved = read_state(init)["config"]
            known = {f.name for f in dataclasses.fields(Config)} - set(OWN)
            values = {k: v for k, v in saved.items() if k in known} | {"baseline": 0}  # it would not begin from nothing
        else:
            values = dict(PRETRAINED)
    elif given.get("data") == "chain":
        values = dict(CHAIN)
    if given.get("data", "builtin") not in ("builtin", values.get("data")):
        values["annotated"] = 0  # the default is builtin's
    cfg = Config(**{**values, **given, "init": init})
    check(cfg)
    return cfg


def check(cfg):
    """ValueError for a value out of range, naming the flag."""
    positive = ("hidden_size", "layers", "heads", "intermediate_size", "context", "thoughts_per_step", "max_steps",
                "batch_size", "micro_batch", "questions_per_step", "minibatch", "max_answer", "eval_size", "log_every",
                "save_every", "keep")
    least = {**dict.fromkeys(positive, 1), "group": 2}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        kinds = (int, float) if f.type is float else (f.type,)
        if type(value) not in kinds or value not in CHOICES.get(f.name, (value,)):
            raise ValueError(f"--{f.name} cannot be {value!r}")  # an edited train.json; flags are checked by their parser
        if f.type in (int, float) and not (least.get(f.name, 0) <= value < float("inf")):
            raise ValueError(f"--{f.name} must be at least {least.get(f.name, 0)}, not {value}")
    if cfg.hidden_size % (2 * cfg.heads):
        raise ValueError(f"--hidden_size {cfg.hidden_size} must be a multiple of twice --heads {cfg.heads}")
    if cfg.minibatch % cfg.questions_per_step or (cfg.questions_per_step * cfg.group) % cfg.minibatch:
        raise ValueError(f"--minibatch {cfg.minibatch} must be --questions_per_step {cfg.questions_per_step} times a "
                         f"divisor of --group {cfg.group}: an optimizer step takes as many rollouts of every question")
    for name in ("temperature", "latent_temperature"):
        if getattr(cfg, name) < 1e-3:
            raise ValueError(f"--{name} must be at least 0.001")
    for part, needs in (("vae", "head"), ("stop", "latent"), ("decode", "latent")):
        if getattr(cfg, part) == "yes" and not METHODS[cfg.method][needs]:
            raise ValueError(f"--{part} yes does not go with --method {cfg.method}")
    if cfg.thoughts_per_step * cfg.max_steps >= cfg.context:
        raise ValueError(f"--thoughts_per_step {cfg.thoughts_per_step} times --max_steps {cfg.max_steps}: no room in "
                         f"--context {cfg.context}")


# --- set-up ---

class Run:
    """What a stage needs besides its model: processes, device, folder, log."""

    def __init__(self, cfg, name):
        self.cfg, self.name = cfg, name
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = device_of(cfg)
        gpu = self.device.type == "cuda"
        self.bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and gpu)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        self.compile = cfg.compile == "yes" or (cfg.compile == "auto" and gpu)
        self.dir = Path(cfg.out_dir) / name
        self.main = self.rank == 0
        self.resumed = None  # checkpoint that the run goes on from
        self.signal = 0  # number of a signal that asks the run to stop

    def log(self, **values):
        """Append one line to metrics.jsonl. OSError where it cannot be written."""
        if self.main:
            file = self.dir / "metrics.jsonl"
            try:
                with open(file, "a", encoding="utf-8") as f:
                    f.write(json.dumps(values) + "\n")
            except OSError as e:
                raise unwritten(file, e) from None

    def say(self, text):
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def memory_gb(self):
        """Peak so far: of the GPU's memory, or of the process."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)

    def bar(self, total, initial):
        # disable=None: quiet where there is no terminal
        return tqdm(total=total, initial=initial, desc=self.name, disable=None if self.main else True)

    def largest(self, value):
        """The largest of all processes' numbers."""
        t = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(t, dist.ReduceOp.MAX)
        return float(t)

    def mean(self, values):
        """Dict of numbers, averaged over processes."""
        if self.world == 1:
            return values
        t = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return dict(zip(values, (t / self.world).tolist()))

    @contextmanager
    def claim(self):
        """Make the run's folder and hold it. ValueError where another run holds it."""
        if not self.main:
            yield
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.dir, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
            except BlockingIOError:
                raise ValueError(f"{self.dir}: another run is writing there (give another --out_dir)") from None
            for leftover in self.dir.glob(".tmp-*"):
                shutil.rmtree(leftover)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def deferred_signals(self):
        """Ctrl-C and SIGTERM let the step end and a checkpoint be written; a second one stops at once."""
        def ask(number, _):
            self.signal = number
            signal.signal(number, before[number])
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {n: signal.signal(n, ask) for n in numbers}
        try:
            yield
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)

    def asked_to_stop(self):
        """The same answer on all processes: a signal may reach them at different steps."""
        return self.mean({"stop": float(self.signal > 0)})["stop"] > 0

    def wrap(self, module, model):
        """Compile, then DDP."""
        if self.compile:
            for llama in (model.policy, model.decoder):
                if llama is not None and not llama.compiled:
                    llama.compile_blocks()
        if self.world == 1:
            return module
        return DDP(module, device_ids=[self.device.index] if self.device.type == "cuda" else None)


def unwritten(path, error):
    return OSError(f"{path} could not be written ({error.strerror or error}); earlier checkpoints stand")


def device_of(cfg):
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device("cpu")


def generator(*ids):
    """A CPU generator that depends on the numbers given and on nothing else."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(ids).generate_state(1, np.uint64)[0] >> 1))


SFT_NOISE, RL_NOISE, RL_ORDER, WEIGHTS = range(4)  # streams of random numbers of a seed


@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(seed, step, n, size):
    """Indices of the examples of global batch `step`: a function of its arguments alone. Epochs follow one
    another without a short batch, so any n and size go together."""
    places = range(step * size, (step + 1) * size)
    return [int(permutation(seed, p // n, n)[p % n]) for p in places]


def make_optimizer(module, cfg, weight_decay=0.0):
    """AdamW, fused; no decay on norms and biases (all vectors). The learning rate is set at each step."""
    params = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)


def build(cfg, run):
    """Model and tokenizer that cfg asks for. A checkpoint of another method gives the parts that both have; RL refuses
    parts that were never trained."""
    torch.manual_seed(generator(cfg.seed, WEIGHTS).initial_seed())
    device = device_of(cfg)
    init = Path(cfg.init) if cfg.init else None
    method = METHODS[cfg.method]
    parts = {k: {"yes": True, "no": False}.get(getattr(cfg, k), method[k]) for k in ("vae", "stop", "decode")}
    tokenizer = Tokenizer.from_pretrained(init) if init else builtin_tokenizer()
    model = policy = None
    if init:
        if (init / "latent.json").is_file():
            model = LatentReasoner.from_pretrained(init, device=device)
        policy = model.policy if model else LLaMA.from_pretrained(init, device=device)
        check_vocabulary(tokenizer, policy, init)
    tokenizer.add_special(START, END)
    start, end = tokenizer.token_id(START), tokenizer.token_id(END)
    latent = LatentConfig(**{**method, **parts}, method=cfg.method, thoughts_per_step=cfg.thoughts_per_step,
                          max_steps=cfg.max_steps, start_id=start, end_id=end, eos_id=tokenizer.end_id())
    if model:
        model, new = model.reconfigured(latent)
        if new and cfg.stage == "rl":
            raise ValueError(f"--stage rl: {cfg.init} has no {new[0]}; train it first (--stage vae --init {cfg.init})")
        if new:
            run.say(f"{run.name}: not in {cfg.init}, made new: {', '.join(new)}")
        return model.to(device), tokenizer
    if cfg.stage == "rl":
        raise ValueError(f"--stage rl starts from a checkpoint of --stage vae; {cfg.init} is a bare LLaMA")
    if not policy:
        policy = LLaMA(LLaMAConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size,
            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, num_key_value_heads=cfg.heads,
            head_dim=cfg.hidden_size // cfg.heads, max_position_embeddings=cfg.context,
            eos_token_id=tokenizer.eos_id))
    like = tokenizer.encode_ordinary("<<")
    policy.add_tokens([start, end], like[0] if len(like) == 1 else None)
    return LatentReasoner(policy, latent).to(device), tokenizer


def read_data(cfg, tokenizer, model, run, split):
    """Encoded examples of a split; what is left out is counted and said. Only to imitate steps takes questions that show
    them: RL and validation use all, and so does answer-only training."""
    context = min(cfg.context, model.policy.config.max_position_embeddings)
    fits, long = encode_all(load(cfg.data, split, cfg.data_dir), tokenizer, context)
    imitates = split == "train" and run.name != "rl" and cfg.method != "nocot"
    usable = [e for e in fits if e.steps or not imitates]
    if long or len(usable) < len(fits):
        run.say(f"{cfg.data} {split}: left out {long} examples longer than {context} tokens "
                f"and {len(fits) - len(usable)} without steps")
    if not usable:
        mend = " (--method nocot needs no steps)" if imitates and fits else ""
        raise ValueError(f"--data {cfg.data}: no example of split {split} is left{mend}")
    shown = usable[:cfg.annotated or None] if imitates else usable
    if len(shown) < len(usable):
        run.say(f"{run.name}: imitates the first {len(shown)} of {len(usable)} training questions (--annotated)")
    return shown


# --- checkpoints ---

def save_checkpoint(run, model, tokenizer, optimizer, names, state):
    """A complete folder step-N, written under another name, flushed, then renamed. The newest cfg.keep are kept, and
    the best by validation. OSError where it cannot be written; what was there before stands."""
    if not run.main:
        return
    final = run.dir / f"step-{state['step']:07d}"
    tmp = run.dir / f".tmp-{state['step']:07d}"
    tensors = {f"{key}.{names[p]}": v.reshape(-1) if v.dim() == 0 else v
               for p, s in optimizer.state.items() for key, v in s.items()}
    try:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        save_tensors(tensors, tmp / "optimizer.safetensors")
        write_json(tmp / "train.json", {"config": dataclasses.asdict(run.cfg), **state})
        os.replace(tmp, final)
        flush(run.dir)
    except OSError as e:
        shutil.rmtree(tmp, ignore_errors=True)
        raise unwritten(final, e) from None
    kept = sorted(run.dir.glob("step-*"))[-run.cfg.keep:]
    for old in run.dir.glob("step-*"):
        if old not in kept and int(old.name[5:]) != state["best"].get("step"):
            remove(old)


def remove(ckpt):
    """Delete a checkpoint: it is whole, or it has another name."""
    hidden = ckpt.with_name(f".tmp-{ckpt.name}")
    os.replace(ckpt, hidden)
    shutil.rmtree(hidden)


def flush(folder):
    """Have a rename in `folder` on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_optimizer(optimizer, names, ckpt):
    by_name = {name: p for p, name in names.items()}
    for key, v in load_file(ckpt / "optimizer.safetensors").items():
        kind, name = key.split(".", 1)
        p = by_name[name]
        optimizer.state[p][kind] = (v.reshape(()) if kind == "step" else v).to(p.device)


FREE = ("resume", "init", "micro_batch", "device", "compile", "threads", "log_every", "save_every", "keep", "stage",
        "baseline", "out_dir")  # what a resumed run may change


def resumed(cfg, given, folder):
    """(cfg, checkpoint, its state) of a run to go on with: its own settings, but for those of FREE. cfg as it is, None
    and the state of a beginning where there is nothing to go on with. ValueError for a flag that would make it another
    run."""
    if not cfg.resume or not list(folder.glob("step-*/train.json")):
        return cfg, None, {"step": 0, "best": {}}
    ckpt = find_checkpoint(folder)
    state = read_state(ckpt)
    saved = state.pop("config")
    known = {f.name for f in dataclasses.fields(cfg)} - set(FREE)
    for k in known & set(given) & set(saved):
        if saved[k] != given[k]:
            raise ValueError(f"--{k} {given[k]}: --resume goes on with a run that has --{k} {saved[k]} ({folder})")
    init = cfg.init if "init" in given else saved["init"]
    cfg = dataclasses.replace(cfg, **{k: v for k, v in saved.items() if k in known}, init=init)
    check(cfg)
    return cfg, ckpt, state


def lr_at(step, first, steps, peak, least, optimizer_step, warmup):
    """Cosine over steps [first, first + steps) from `peak` to `least` times that, with a linear warm-up after each new
    optimizer."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - first) / steps))
    return peak * (least + (1 - least) * cosine) * min(1.0, (optimizer_step + 1) / max(1, warmup))


def finish_step(run, optimizer, lr, step, ids, parts):
    """Clip and step. A gradient that is not finite stops the run before the weights are touched."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(params, run.cfg.clip))
    if not math.isfinite(norm):
        parts = run.mean({k: float(v) for k, v in parts.items()})  # all processes are here, and say the same
        bad = [k for k, v in parts.items() if not math.isfinite(v)] or ["gradient"]
        raise FloatingPointError(f"step {step}: {', '.join(bad)} is not finite; the last checkpoint stands "
                                 f"(batch: {', '.join(ids)})")
    for g in optimizer.param_groups:
        g["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@contextmanager
def begin(cfg, name, given):
    """What both kinds of training start from: a new run or a resumed one, its model and its data. A new run takes the
    place of an earlier one in its folder, but only here, when nothing can be wrong with the settings any more. The
    folder is the run's, and signals are deferred, until the `with` block ends."""
    folder = Path(cfg.out_dir) / name
    cfg, ckpt, state = resumed(cfg, given, folder)
    run = Run(cfg, name)
    run.resumed = ckpt
    if not ckpt and cfg.init and Path(cfg.init).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--init {cfg.init} is in {folder}, which this run replaces: give another --out_dir")
    if name == "rl" and run.world > cfg.questions_per_step:
        raise ValueError(f"--questions_per_step {cfg.questions_per_step} is smaller than the number of processes "
                         f"{run.world}")
    if name != "rl" and accumulation(run, cfg.batch_size) * run.world > cfg.batch_size:
        raise ValueError(f"--batch_size {cfg.batch_size} leaves a process without rows ({run.world} processes, "
                         f"--micro_batch {cfg.micro_batch}): raise either")
    model, tokenizer = build(dataclasses.replace(cfg, init=str(ckpt)) if ckpt else cfg, run)
    for llama in (model.policy, model.decoder):
        if llama is not None:
            llama.activation_checkpointing = cfg.activation_checkpointing
    names = {p: n for n, p in model.named_parameters()}
    train = read_data(cfg, tokenizer, model, run, "train")
    valid = read_data(cfg, tokenizer, model, run, "valid")[:cfg.eval_size]
    with run.claim(), run.deferred_signals():
        metrics = folder / "metrics.jsonl"
        if ckpt:
            run.say(f"{name}: resumed at step {state['step']} of {ckpt}")
        if run.main and ckpt and metrics.exists():  # drop what was logged after the checkpoint, or cut by a kill
            rows = [r for r in metrics.read_text().splitlines(keepends=True) if r.endswith("\n")]
            kept = "".join(r for r, line in zip(rows, read_metrics(rows, metrics)) if line["step"] <= state["step"])
            metrics.with_suffix(".tmp").write_text(kept)
            os.replace(metrics.with_suffix(".tmp"), metrics)
        elif run.main and not ckpt:
            if cfg.resume:
                run.say(f"{name}: nothing to resume in {folder}: it begins")
            for old in folder.glob("step-*"):
                remove(old)
            metrics.unlink(missing_ok=True)
        yield run, cfg, state, model, tokenizer, names, train, valid


# --- supervised stage (paper, section 3.2) ---

def curriculum(cfg, latent, n):
    """[(stage, optimizer steps)]: stage s has its first s steps latent; 0 is text, K is all latent."""
    if not latent:
        epochs = [(0, cfg.cot_epochs + cfg.epochs_per_stage * cfg.max_steps + cfg.final_epochs)]
    else:
        epochs = [(0, cfg.cot_epochs), *((s, cfg.epochs_per_stage) for s in range(1, cfg.max_steps)),
                  (cfg.max_steps, cfg.epochs_per_stage + cfg.final_epochs)]
    steps = [(s, max(1, round(e * n / cfg.batch_size))) for s, e in epochs if e > 0]
    if cfg.max_iters:
        total = sum(k for _, k in steps)
        ends = np.floor(np.cumsum([k for _, k in steps]) * (cfg.max_iters / total)).astype(int)
        steps = [(s, int(b - a)) for (s, _), a, b in zip(steps, [0, *ends[:-1]], ends) if b > a]
    return steps


def train_supervised(cfg, name, given):
    """Curriculum from text to latents (or text alone); the trained checkpoint is in out_dir/name."""
    with begin(cfg, name, given) as (run, cfg, state, model, tokenizer, names, train, valid):
        # epochs count questions that are imitated, so that every method, nocot too, makes as many steps
        stages = curriculum(cfg, model.config.latent, min(len(train), cfg.annotated or len(train)))
        total = sum(k for _, k in stages)
        text_steps = sum(k for s, k in stages if s == 0)
        size = sum(p.numel() for p in model.policy.parameters()) / 1e6
        run.say(f"{name}: {cfg.method}, {size:.2f} M parameters, {len(train)} examples, {total} steps of "
                f"{cfg.batch_size} (" + ", ".join(f"stage {s}: {k}" for s, k in stages) + ")")
        step, first, began, begun_at = state["step"], 0, time.time(), state["step"]
        bar = run.bar(total, step)
        for stage, steps in stages:
            if step >= first + steps:  # done before the checkpoint
                first += steps
                continue
            if stage > 0 and step == first and first == text_steps and not (cfg.init and first == 0):
                model.copy_decoder()
            model.set_trainable(stage)
            # one cosine over the text stage, another over all latent stages
            cosine = (0, text_steps, cfg.cot_lr) if stage == 0 else (text_steps, total - text_steps, cfg.lr)
            optimizer = make_optimizer(model, cfg, cfg.weight_decay)  # made anew at each stage
            if step > first:
                load_optimizer(optimizer, names, run.resumed)
            ddp = run.wrap(model, model)
            model.train()
            while step < first + steps:
                examples = [train[i] for i in batch_indices(cfg.seed, step, len(train), cfg.batch_size)]
                lr = lr_at(step, *cosine, cfg.min_lr, step - first, cfg.warmup)
                step += 1
                norm, parts = supervised_step(run, ddp, optimizer, examples, stage, step, lr)
                bar.update()
                if step % cfg.log_every == 0 or step == total:
                    seconds = time.time() - began
                    parts = {k: v * run.world for k, v in run.mean({k: float(v) for k, v in parts.items()}).items()}
                    run.log(step=step, stage=stage, lr=lr, grad_norm=norm, seconds=round(seconds, 2),
                            memory_gb=run.memory_gb(), **parts)
                    bar.set_postfix(stage=stage, **{k: f"{v:.3f}" for k, v in parts.items()},
                                    examples_s=f"{cfg.batch_size * (step - begun_at) / seconds:.0f}")
                state |= {"step": step, "stage": stage}
                end_step(run, model, tokenizer, optimizer, names, valid, state, total, step == first + steps)
            first += steps
        bar.close()
        return model, tokenizer


def accumulation(run, examples):
    """Micro-batches of so many examples."""
    return -(-examples // (run.cfg.micro_batch * run.world))


def supervised_step(run, ddp, optimizer, examples, stage, step, lr):
    """One optimizer step on a global batch; each process takes its rows. Returns gradient norm and loss parts."""
    cfg, model = run.cfg, getattr(ddp, "module", ddp)
    noise = None
    if model.config.vae and stage > 0:
        shape = min(stage + 1, cfg.max_steps), cfg.thoughts_per_step, model.policy.config.hidden_size
        noise = torch.randn(len(examples), *shape, generator=generator(cfg.seed, SFT_NOISE, step - 1))
    tokens = target_tokens(examples, model.config, stage)
    # rows of like length go together: less padding, the same batch
    order = np.argsort([len(e.question) + sum(map(len, e.steps)) for e in examples], kind="stable")
    micro_steps = np.array_split(order, accumulation(run, len(examples)))
    parts = {}
    for micro, rows in enumerate(micro_steps):
        rows = rows[run.rank::run.world]
        batch = collate([examples[i] for i in rows], model.config, stage, None if noise is None else noise[rows],
                        len(examples), tokens)
        # gradients are averaged over processes once, at the last micro step
        with ddp.no_sync() if run.world > 1 and micro + 1 < len(micro_steps) else nullcontext():
            with run.autocast:
                losses = ddp(batch.to(run.device))
            loss = sum(v * (cfg.beta_kl if k == "kl" else 1.0) for k, v in losses.items())
            (loss * run.world).backward()  # DDP takes the mean, the losses are shares of a sum
        for k, v in losses.items():
            parts[k] = parts.get(k, 0.0) + v.detach()
    return finish_step(run, optimizer, lr, step, [e.example.id for e in examples], parts), parts


def validate(run, model, tokenizer, valid, step, stage):
    """Greedy figures on validation questions; each process does its share. None at stage 0 of a latent method: there
    the model still writes text, and there is nothing to measure yet."""
    if model.config.latent and stage == 0:
        return None
    mine = valid[run.rank::run.world]
    figures, _ = evaluate(model, tokenizer, mine)
    figures = run.mean({k: v * len(mine) for k, v in figures.items() if k != "n"})
    figures = {k: v * run.world / len(valid) for k, v in figures.items()}
    model.train()
    run.log(step=step, stage=stage, valid=figures)
    shown = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
    run.say(f"{run.name} step {step} stage {stage}: validation {shown}")
    return figures


def end_step(run, model, tokenizer, optimizer, names, valid, state, total, evaluate_now=False):
    """What is due after step state["step"] of either training: validation, a checkpoint, the end that a signal asks for
    (SystemExit with 128 + its number, once the checkpoint is written)."""
    cfg, step = run.cfg, state["step"]
    better = False
    if step == total or evaluate_now or (cfg.eval_every and step % cfg.eval_every == 0):
        figures = validate(run, model, tokenizer, valid, step, state["stage"])
        better = figures is not None and figures["accuracy"] > state["best"].get("accuracy", -1)
        if better:
            state["best"] = {"step": step, "accuracy": figures["accuracy"]}
    stop = run.asked_to_stop()
    if better or stop or step == total or step % cfg.save_every == 0:
        save_checkpoint(run, model, tokenizer, optimizer, names, state)
    if stop:
        run.say(f"{run.name}: stopped at step {step}; the same command with --resume goes on")
        raise SystemExit(128 + (run.signal or signal.SIGINT))


# --- reinforcement learning (paper, section 3.3) ---

def train_rl(cfg, name, given):
    """GRPO on questions and answers, from the checkpoint cfg.init; the trained checkpoint is in out_dir/name."""
    with begin(cfg, name, given) as (run, cfg, state, model, tokenizer, names, train, valid):
        Q, G = cfg.questions_per_step, cfg.group
        total = cfg.rl_iters or max(1, len(train) // Q)  # 0: one epoch over the questions
        total = min(total, cfg.max_iters) if cfg.max_iters else total
        if cfg.w_coh and not cfg.w_acc and model.decoder is None:
            raise ValueError(f"--w_acc 0 --w_coh {cfg.w_coh}: {cfg.init} has no decoder to say whether plans are coherent")
        model.set_trainable("rl")
        optimizer = make_optimizer(model, cfg)
        if run.resumed:
            load_optimizer(optimizer, names, run.resumed)
        log_probs = LogProbs(model, cfg.temperature, cfg.latent_grad, cfg.latent_temperature)
        reference = make_reference(run, model, state) if cfg.kl_coef else None
        ddp = run.wrap(log_probs, model)
        run.say(f"{name}: {total} batches of {Q} questions x {G} rollouts, {Q * G // cfg.minibatch} optimizer steps "
                f"each, from {cfg.init}")
        began, step = time.time(), state["step"]
        if step == 0:
            start = validate(run, model, tokenizer, valid, 0, "rl")
            state |= {"skipped": 0, "best": {"accuracy": start["accuracy"]}}  # to be kept, a checkpoint must be better
        bar = run.bar(total, step)
        while step < total:
            chosen = batch_indices(cfg.seed + (RL_ORDER << 32), step, len(train), Q)
            lr = lr_at(step, 0, total, cfg.rl_lr, cfg.rl_min_lr, step, cfg.rl_warmup)
            step += 1
            stats = rl_step(run, ddp, reference, optimizer, [train[i] for i in chosen], tokenizer, step, lr)
            state |= {"step": step, "stage": "rl", "skipped": state["skipped"] + ("grad_norm" not in stats)}
            bar.update()
            bar.set_postfix({k: f"{stats[k]:.3f}" for k in ("reward", "accuracy", "coherence")},
                            rollouts_s=f"{Q * G / (stats['rollout_s'] + stats['score_s'] + stats['update_s']):.0f}")
            if step % cfg.log_every == 0 or step == total:
                run.log(step=step, lr=lr, skipped=state["skipped"], seconds=round(time.time() - began, 2),
                        memory_gb=run.memory_gb(), **stats)
            end_step(run, model, tokenizer, optimizer, names, valid, state, total)
        bar.close()
        return model, tokenizer


def make_reference(run, model, state):
    """LogProbs of the policy that RL began with, to take a KL from. It stays in cfg.init, from where a resumed run reads
    it again: ValueError, FileNotFoundError where something else, or nothing, is there by then."""
    init = Path(run.cfg.init)
    if not (init / "latent.json").is_file():
        raise FileNotFoundError(f"{init}: no such checkpoint; --kl_coef needs the one that RL began with (--init, wherever "
                                "it is now)")
    config = dataclasses.replace(model.config, decode=False)
    start = LatentReasoner.from_pretrained(init, device=run.device, decode=False).reconfigured(config)[0]
    start.requires_grad_(False)
    digest = hashlib.sha256()
    for p in start.parameters():
        digest.update(p.cpu().numpy())
    if state.setdefault("start", digest.hexdigest()) != digest.hexdigest():
        raise ValueError(f"{init} is not the checkpoint that this run began with, from which --kl_coef takes the KL; name "
                         "that by --init, or begin anew without --resume")
    if run.compile:
        start.policy.compile_blocks()
    # latents that are not sampled are no actions: the reference makes its own
    return LogProbs(start, run.cfg.temperature, "score" if config.vae else run.cfg.latent_grad)


def rl_step(run, ddp, reference, optimizer, examples, tokenizer, step, lr):
    """Rollouts of a global batch of questions, their rewards, and the optimizer steps on them; each process takes its
    questions. Returns statistics. Where every group has one reward, there is nothing to learn and no step, for the KL alone
    neither: near the start its gradient is rounding, of which AdamW would make a full step."""
    cfg, model, G = run.cfg, getattr(ddp, "module", ddp).model, run.cfg.group
    Q, d = len(examples), model.policy.config.hidden_size
    mine = list(range(Q))[run.rank::run.world]
    noise = Noise.draw(Q * G, model.config, d, cfg.max_answer, generator(cfg.seed, RL_NOISE, step - 1))
    noise = noise[torch.tensor([i * G + g for i in mine for g in range(G)])]
    clock = [time.time()]
    model.eval()
    with run.autocast:
        rollout = model.rollout([examples[i].question for i in mine], G, noise, cfg.max_answer, cfg.temperature,
                                cfg.latent_temperature)
        clock.append(time.time())
        result = score(model, rollout, [examples[i].example for i in mine], tokenizer, cfg.w_acc, cfg.w_fmt, cfg.w_coh)
    clock.append(time.time())
    advantage = advantages(result.reward, G, cfg.std_norm).to(run.device)
    stats = {"reward": result.reward, "accuracy": result.correct, "well_formed": result.well_formed,
             "coherence": result.coherence, "decoded": result.decoded,
             "latents": (rollout.steps * cfg.thoughts_per_step).float(),
             "sigma": torch.tensor(rollout.sigma), "advantage": advantage.abs()}
    share = len(mine) * run.world / Q  # processes may have unlike shares of the questions
    stats = run.mean({k: float(v.mean()) * share for k, v in stats.items()})
    stats["coherence"] /= max(stats.pop("decoded"), 1 / (Q * G))  # of the plans that were decoded
    if stats["advantage"] > 0:
        model.train()
        stats |= update(run, ddp, reference, optimizer, rollout, advantage, lr, step, [e.example.id for e in examples])
    clock.append(time.time())
    return stats | dict(zip(("rollout_s", "score_s", "update_s"), np.round(np.diff(clock), 4).tolist()))


def update(run, ddp, reference, optimizer, rollout, advantage, lr, step, ids):
    """Optimizer steps over one batch of rollouts. Each takes as many rollouts of every question, so that what is
    in it does not depend on the number of processes; a micro-batch is some questions with theirs."""
    cfg, G = run.cfg, rollout.group
    members = cfg.minibatch // cfg.questions_per_step
    # where all rewards of a group are equal, nothing is learned, but how near to stay to the start; one question is kept
    # for DDP to average
    learns = (advantage.view(-1, G) != 0).any(dim=1) | (reference is not None)
    active = learns.nonzero().flatten().tolist() or [0]
    parts = np.array_split(active, -(-len(active) * members // max(cfg.micro_batch, members)))
    batches, largest, norms = [], 0.0, []
    counts = {"ratios": 0.0, "clipped": 0.0} | ({"kl": 0.0} if reference is not None else {})
    for first in range(0, G, members):
        rows = [torch.tensor([q * G + g for q in part for g in range(first, first + members)]) for part in parts]
        batches.append([(rollout.rows(r.to(advantage.device)), advantage[r]) for r in rows])
    # Densities of latents are sums over d: in bfloat16 the rounding in which a cached rollout and the parallel pass differ
    # moves their ratios far from 1. So the old ones come from the same pass as the new (the first batch's own: no step was
    # taken before it); without a graph of gradients torch.compile might fuse, and round, that otherwise.
    again, log_probs = run.bf16 and cfg.latent_grad == "score", getattr(ddp, "module", ddp)
    for cut, _ in chain(*batches[1:]) if again else ():
        with run.autocast:
            cut.record(log_probs(cut))
    for batch in batches:
        for micro, (cut, a) in enumerate(batch):
            with ddp.no_sync() if run.world > 1 and micro + 1 < len(batch) else nullcontext():
                with run.autocast:
                    new = ddp(cut)
                if again and batch is batches[0]:
                    cut.record(new)
                loss, stat = objective(new, cut, a, cfg.minibatch, cfg.ratio_clip, cfg.latent_coef, cfg.latent_mean)
                if reference is not None:
                    with run.autocast:
                        # of actions given those before them: by path too, of the latents as they were sampled
                        now = log_probs(cut, fixed=True) if log_probs.path and log_probs.model.config.vae else new
                        with torch.no_grad():
                            before = reference(cut)
                    kl = divergence(now, before, cut).sum()
                    loss = loss + cfg.kl_coef * kl / cfg.minibatch
                    stat["kl"] = float(kl.detach())
                (loss * run.world).backward()
                largest = max(largest, stat.pop("ratio_max"))
                counts = {k: v + stat[k] for k, v in counts.items()}
        norms.append(finish_step(run, optimizer, lr, step, ids, {"objective": loss.detach()}))
    counts = run.mean(counts)
    stats = {"grad_norm": float(np.mean(norms)), "ratio_max": run.largest(largest),
             "clip_frac": counts["clipped"] / counts["ratios"]}
    if reference is not None:  # every rollout was in one of the minibatches
        stats["kl"] = counts["kl"] * run.world / (cfg.minibatch * len(batches))
    return stats


# --- main ---

def report(cfg, rows):
    """The closing table: each trained model on the built-in test sets (or the data's own test split), greedy."""
    names = TEST_SETS if cfg.data == "builtin" else (cfg.data,)
    split = "test" if cfg.data in (*BUILTIN, *DATASETS) else "valid"  # of a user's file, what is not trained on
    lines = []
    for label, (model, tokenizer) in rows.items():
        sets = []
        for name in names:
            context = model.policy.config.max_position_embeddings
            encoded, _ = encode_all(load(name, split, cfg.data_dir), tokenizer, context)
            sets.append((name, evaluate(model, tokenizer, encoded)[0]))
        mean = mean_figures(sets)
        accuracy = {n: f"{100 * f['accuracy']:.1f}" for n, f in [*sets, ("mean", mean)]}
        extra = {"tokens": f"{mean['tokens']:.2f}", "coherence": f"{100 * mean['coherence']:.1f}"}
        lines.append((label, accuracy | extra))
    print(markdown(["", *lines[0][1]], [[label, *f.values()] for label, f in lines]))


def reuse_memory():
    """Large blocks that are freed stay with the process. As glibc is set, the kernel gets them back and clears their
    pages anew at every step: up to a sixth of the time of a step on a CPU."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(option, 2**31 - 1)


@contextmanager
def processes(cfg):
    """Join torchrun's other processes, if there are any. Where one of them ends or hangs, this one ends too.

    A group that something still refers to survives destroy_process_group, and threads of gloo that outlive the
    interpreter abort the process."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    device = device_of(cfg)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the longest that processes wait for one another: rank 0 writes checkpoints alone
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield
    except SystemExit:  # a signal: all processes stop after the same step
        dist.destroy_process_group()
        raise
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        time.sleep(10)  # torchrun ends this process meanwhile: its last lines are about the one that ended first
        raise ConnectionError("another process of this run has ended, or hangs") from None
    dist.destroy_process_group()  # after an error it could wait for processes that are gone


def main(argv=None):
    given = parse(argv)
    cfg = resolve(given)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.set_float32_matmul_precision("high")
    reuse_memory()
    with processes(cfg):
        if cfg.stage == "rl":
            train_rl(cfg, "rl", given)
        elif cfg.stage == "cot":
            if given.get("method", "cot") != "cot":
                raise ValueError(f"--stage cot is --method cot: leave --method {cfg.method} out")
            train_supervised(dataclasses.replace(cfg, method="cot"), "cot", {**given, "method": "cot"})
        elif cfg.stage == "vae":
            train_supervised(cfg, "vae", given)
        else:
            train_all(cfg, given)


def train_all(cfg, given):
    """The default job: the stages in turn, and their table."""
    rows = {}
    if cfg.method == "atp":
        if cfg.baseline:
            own = {"method": "nocot", "max_iters": cfg.baseline, "vae": "auto", "stop": "auto", "decode": "auto"}
            other = dataclasses.replace(cfg, **own)
            rows["answer only (nocot)"] = train_supervised(other, "nocot", given | own)
        rows["latents, imitation (vae)"] = train_supervised(cfg, "vae", given)
        if dist.is_initialized():
            dist.barrier()  # the checkpoint is there for every process
        cfg = resolve({**given, "init": str(Path(cfg.out_dir) / "vae")})
        rows["latents, active planning (rl)"] = train_rl(cfg, "rl", given)
    else:
        rows[cfg.method] = train_supervised(cfg, "vae", given)
    if not dist.is_initialized() or dist.get_rank() == 0:
        report(cfg, rows)


if __name__ == "__main__":
    run_main(main)
