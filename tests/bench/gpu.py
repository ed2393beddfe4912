"""What `python tests/bench/bench.py --workloads 1B-train` prints: supervised training, RL and evaluation in
Llama-3.2-1B's shape, with the settings for pretrained models. Rows are printed as they are measured."""

import gc
import sys
import traceback
from collections import Counter
from dataclasses import replace

import torch

import bench
from eval import evaluate
from rl import compute_rewards
from train import Run


def guarded(b, label, columns, measure):
    """Print a row of what measure() finds, at once: another row may run out of memory."""
    gc.collect()
    if b.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found = measure()
        cells = [f"{found[c]:.3g}" if found[c] < 100 else f"{found[c]:.0f}" for c in columns]
    except torch.OutOfMemoryError:
        cells = ["out of memory"] + [""] * (len(columns) - 1)
    except RuntimeError as e:  # the rows after this one are still worth having
        traceback.print_exc()
        cells = [f"failed: {str(e).splitlines()[0][:60]}"] + [""] * (len(columns) - 1)
    b.model.zero_grad(set_to_none=True)
    print(f"| {' | '.join([label, *cells])} |", flush=True)


def head(title, columns):
    print("\n" + bench.markdown([title, *columns], []), flush=True)


def profiled(f, device, show):
    """How long the GPU was busy in f(), and with how many kernels and copies. show: print the longest."""
    if device.type != "cuda":
        return {"busy s": 0.0, "kernels": 0}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        f()
        torch.cuda.synchronize()
    spent, count = Counter(), Counter()
    for e in prof.events():
        if e.device_type == torch.autograd.DeviceType.CUDA:
            spent[e.name] += e.time_range.elapsed_us() / 1e6
            count[e.name] += 1
    for name, s in spent.most_common(25 if show else 0):
        print(f"    {s:8.4f} s {count[name]:6d} x {name[:100]}", file=sys.stderr)
    return {"busy s": sum(spent.values()), "kernels": sum(count.values())}


def sft_1b(b, args):
    columns = ["examples/s", "TFLOP/s", "peak GB", "reserved GB", "step s", "busy s", "kernels",
               "first step s"]
    head(f"SFT, {b.spec['batch']} a batch", columns)

    def measure(micro):
        b.use(Run(replace(b.cfg, micro_batch=micro), "vae"))
        work = bench.supervised(b)
        found = bench.rounds(work, args.seconds, least=2)
        s = sum(r["s"] for r in found[1:])
        out = {"examples/s": b.spec["batch"] * len(found[1:]) / s, "step s": bench.median(found, "s"),
               "TFLOP/s": sum(r["flops"] for r in found[1:]) / s / 1e12, "peak GB": b.memory(),
               "reserved GB": reserved(b.device), "first step s": found[0]["s"]}
        return out | profiled(lambda: work(1), b.device, args.profile)

    for micro in args.micro:
        guarded(b, f"micro-batch {micro}", columns, lambda: measure(micro))


def reserved(device):
    """Peak of what the allocator took from the device, GB."""
    return torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0


def rl_1b(b, args):
    Q, G = b.spec["questions"], b.spec["group"]
    columns = ["rollout s", "decode all s", "update s", "rollouts/s", "peak GB", "rollout busy s",
               "rollout kernels", "update busy s", "update kernels", "first round s"]
    head(f"RL, {Q} x {G}", columns)

    def measure(grad, minibatch):
        run = Run(replace(b.cfg, latent_grad=grad, minibatch=minibatch), "rl")
        b.use(run)
        ddp, optimizer = bench.reinforced(b)
        last = {}

        def roll(step):
            questions = b.batch(step, Q)
            with run.autocast():
                last["rollout"] = b.model.rollout([e.question for e in questions], G, b.noise(Q * G, step),
                                                  run.cfg.max_answer)
            last["examples"] = [replace(e.example, answer="1") for e in questions]

        def decode():
            with run.autocast():
                # all answers are right, so all plans are decoded
                compute_rewards(b.model, last["rollout"], last["examples"], bench.Stub(), run.cfg)

        def work(step):
            b.model.eval()
            out = {"rollout": bench.timed(lambda: roll(step), b.device)}
            out["decode"] = bench.timed(decode, b.device)
            return out | {"update": bench.full_update(b, ddp, optimizer, last["rollout"], step)}

        found = bench.rounds(work, args.seconds, least=2)
        s = {k: bench.median(found, k) for k in found[0]}
        out = {"rollout s": s["rollout"], "decode all s": s["decode"], "update s": s["update"],
               "rollouts/s": Q * G / sum(s.values()), "peak GB": b.memory(),
               "first round s": sum(found[0].values())}
        b.model.eval()
        parts = {"rollout": lambda: roll(1),
                 "update": lambda: bench.full_update(b, ddp, optimizer, last["rollout"], 1)}
        for part, f in parts.items():
            out |= {f"{part} {k}": v for k, v in profiled(f, b.device, args.profile).items()}
        return out

    for grad in ("score", "path"):
        for minibatch in (Q, Q * G):
            guarded(b, f"{grad}, minibatch {minibatch}", columns, lambda: measure(grad, minibatch))


def eval_1b(b, args):
    columns = ["questions/s", "peak GB", "busy s", "kernels", "first batch s"]
    questions = b.batch(0, 2 * b.spec["batch"])
    head(f"evaluation, {len(questions)} questions", columns)

    def measure(batch):
        b.use(Run(b.cfg, "vae"))
        work = lambda some: evaluate(b.model, b.tokenizer, some, batch, bf16=b.run.bf16)
        warm = bench.timed(lambda: work(questions[:batch]), b.device)
        s = bench.timed(lambda: work(questions), b.device)
        found = {"questions/s": len(questions) / s, "peak GB": b.memory(), "first batch s": warm}
        return found | profiled(lambda: work(questions), b.device, args.profile)

    for batch in (128, 256, 512):
        guarded(b, f"batch {batch}", columns, lambda: measure(batch))


def train_1b(args):
    """Rows of SFT, RL and evaluation in Llama-3.2-1B's shape."""
    b = bench.Bench("1B-train", args, **(bench.TINY if args.tiny else {}))
    gpu = b.device.type == "cuda"
    card = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    size = sum(p.numel() for p in b.model.parameters()) / 1e9
    print(f"{card}, torch {torch.__version__}, {size:.2f} G parameters, questions: {b.data}", flush=True)
    for part in args.only.split(","):
        torch._dynamo.reset()  # as in a process of its own
        if part != "sft":
            b.to_the_limit()
        b.use(Run(b.cfg, "vae"))
        {"sft": sft_1b, "rl": rl_1b, "eval": eval_1b}[part](b, args)
