"""Does an answer depend on the plan? Questions are answered again after other latents than the model's own.

    python tests/tools/intervene.py --ckpt out/rl --data in_dist reworded --limit 600

Each kind of latents is a row:
- zero
- noise, each latent as long as the one it replaces
- other: the plan of another question of the batch, which has as many steps and another answer. Questions
  without such a partner are left out
- reverse: the same steps in reverse order
- none: no step, <|end-latent|> comes at once
The columns: number of questions, accuracy before and after, share of answers that change, share that become
the partner's answer, mean change of log p(right answer | question, plan) in nats.
"""

import sys
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import TEST_SETS, Parser, Tokenizer, cli, encode_all, extract_answer, is_correct  # noqa: E402
from eval import find_checkpoint, markdown, read_sets, read_state  # noqa: E402
from model import Padded, length_mask  # noqa: E402
from vae import LatentReasoner, device_of, generator, precise, to_device  # noqa: E402

KINDS = ("zero", "noise", "other", "reverse", "none")


# --- what follows a given plan: the first `steps` (B,) of z (B, N, c, d). prefix: a rollout's ---

def follow(model, prefix, z, steps, tail):
    """The hidden state (B, d) at <|end-latent|>, and the cache with room for `tail` tokens."""
    z, (_, cache) = z.flatten(1, 2), model.read_questions(prefix, z.shape[1] * z.shape[2] + 1 + tail)
    end = model.policy.embed_tokens(torch.full_like(steps[:, None], model.config.end_id))
    mask = F.pad(length_mask(steps * model.config.thoughts_per_step, z.shape[1]), (0, 1), value=True)
    return model.policy.step(torch.cat((z, end), dim=1), cache, mask)[:, -1], cache


def answer(model, prefix, z, steps, max_tokens):
    """Greedy answers: tokens (B, A) and lengths (B,)."""
    h, cache = follow(model, prefix, z, steps, max_tokens)
    return model.generate(model.policy, h, cache, max_tokens)


def log_prob(model, prefix, z, steps, text):
    """log p (B,) of a Padded text."""
    h, cache = follow(model, prefix, z, steps, text.ids.shape[1])
    rest = model.policy.step(model.policy.embed_tokens(text.ids[:, :-1]), cache, text.mask[:, :-1])
    logits = model.policy.logits(torch.cat((h[:, None], rest), dim=1))[..., :model.config.vocab_size]
    logp = precise(logits).log_softmax(dim=-1).gather(2, text.ids[..., None])[..., 0]
    return (logp * text.mask).sum(dim=1)


# --- interventions ---

def change_plan(kind, plan, donors, numbers):
    """Latents of a kind in the place of a plan's: z and steps. numbers: a torch.Generator on the CPU."""
    z, steps = plan.z, plan.steps
    if kind == "noise":
        noise = torch.randn(z.shape, generator=numbers).to(z)
        return noise * (z.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)), steps
    if kind == "other":
        return z[donors], steps
    if kind == "reverse":
        order = (steps[:, None] - 1 - torch.arange(z.shape[1], device=z.device)).clamp(min=0)
        return z.take_along_dim(order[:, :, None, None], dim=1), steps
    return torch.zeros_like(z), steps if kind == "zero" else torch.zeros_like(steps)


@torch.no_grad()
def intervene(model, tokenizer, questions, numbers, max_tokens=16, kinds=KINDS):
    """{kind: {index: figures}} of a batch of data.Encoded questions. The partner of a question is the next
    one in the batch that has as many steps and another answer."""
    rollout = model.rollout([e.question for e in questions], max_tokens=max_tokens)
    prefix, plan, n = rollout.prefix, rollout.plan, rollout.plan.steps.tolist()
    right = to_device(Padded.of([e.answer for e in questions]), model.device)
    logp = log_prob(model, prefix, plan.z, plan.steps, right)
    texts, _ = model.texts(rollout.tokens, rollout.lengths, tokenizer)
    answers, rows = [extract_answer(text) for text in texts], [*range(len(questions))]
    fits = lambda b, o: n[o] == n[b] and answers[o] not in (answers[b], None)
    donors = [next((o for o in rows[b + 1:] + rows[:b] if fits(b, o)), None) for b in rows]
    found = {}
    for kind in kinds:
        z, steps = change_plan(kind, plan, [b if o is None else o for b, o in zip(rows, donors)], numbers)
        gains = (log_prob(model, prefix, z, steps, right) - logp).tolist()
        others, _ = model.texts(*answer(model, prefix, z, steps, max_tokens), tokenizer)
        found[kind] = {}
        for b in (b for b in rows if kind != "other" or donors[b] is not None):
            example, new = questions[b].example, extract_answer(others[b])
            found[kind][b] = {
                "before": is_correct(texts[b], example), "after": is_correct(others[b], example),
                "changed": new != answers[b], "gain": gains[b],
                "follows": kind == "other" and new == answers[donors[b]]}
    return found


def row(kind, figures):
    """{column: text} of a kind, from the figures of its questions."""
    means = {name: mean(float(each[name]) for each in figures) for name in figures[0]} if figures else {}
    share = lambda name: f"{100 * means[name]:.1f}" if figures else ""
    return {"n": str(len(figures)), "accuracy before %": share("before"), "after %": share("after"),
            "changed %": share("changed"), "partner's answer %": share("follows") if kind == "other" else "",
            "change of log p(right)": f"{means['gain']:+.2f}" if figures else ""}


def main(argv=None):
    p = Parser(description="Answer after other latents than the model's own. Defaults are in brackets.")
    p.add_argument("--ckpt", default="out", help="checkpoint, run or folder of runs: its newest (out)")
    p.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of latents (all)")
    p.add_argument("--data", nargs="+", default=TEST_SETS, help=f"test sets or files {TEST_SETS}")
    p.add_argument("--data_dir", default="data", help="of the published files (data)")
    p.add_argument("--split", default="test", choices=["test", "valid", "train"], help="of each (test)")
    p.add_argument("--limit", type=int, default=0, help="questions of each (0: all)")
    p.add_argument("--batch_size", type=int, default=128, help="questions a pass (128)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    flags = vars(p.parse_args(argv))
    examples = sum(read_sets(flags).values(), [])
    ckpt = find_checkpoint(flags["ckpt"])
    model = LatentReasoner.from_pretrained(ckpt, device=device_of(flags["device"]), decode=False).eval()
    if not model.config.latent:
        raise ValueError(f"{ckpt} does not think in latents")
    tokenizer = Tokenizer.from_pretrained(ckpt)
    encoded, skipped = encode_all(examples, tokenizer, model.policy.config.max_position_embeddings)
    if skipped:
        print(f"{skipped} questions do not fit the context")
    encoded.sort(key=lambda e: len(e.question))  # less padding
    max_tokens, numbers = int(read_state(ckpt)["config"].get("max_answer", 16)), generator(flags["seed"])
    max_tokens = min(max_tokens, model.policy.config.max_position_embeddings)
    found, size = {kind: [] for kind in flags["kinds"]}, max(1, flags["batch_size"])
    for at in tqdm(range(0, len(encoded), size), leave=False, disable=None):
        batch = intervene(model, tokenizer, encoded[at:at + size], numbers, max_tokens, flags["kinds"])
        for kind, figures in batch.items():
            found[kind] += figures.values()
    print(markdown({kind: row(kind, figures) for kind, figures in found.items()}, str(ckpt)))


if __name__ == "__main__":
    cli(main)
