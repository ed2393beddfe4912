"""Independent oracles: a reasoner that reads every row alone, without cache or padding, and a tiny model."""

import torch

from data import Encoded, Example
from model import LLaMA, LLaMAConfig
from vae import METHODS, LatentConfig, LatentReasoner

START, END, EOS = 40, 41, 42


def tiny(method="atp", c=2, K=3, d=16, seed=0, scale=0.3, dtype=torch.float32,
         rows=43, ends=None, **parts):
    """A small reasoner with weights large enough that attention, rotary positions and noise all matter.

    rows: of the embedding; the tokenizer knows the first 43 ids. ends: config.json's eos_token_id."""
    torch.manual_seed(seed)
    policy = LLaMA(LLaMAConfig(vocab_size=rows, hidden_size=d, intermediate_size=24, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=2, head_dim=6, eos_token_id=ends))
    config = LatentConfig(**{**METHODS[method], **parts}, method=method, thoughts_per_step=c, max_steps=K,
                          start_id=START, end_id=END, eos_id=EOS, vocab_size=43)
    model = LatentReasoner(policy, config)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p[:rows] if "embed_tokens" in name else p, std=scale)
    if model.latent_head is not None:
        torch.nn.init.constant_(model.latent_head.logvar.bias, -1.0)
    return model.to(dtype)


def examples(n, seed=0, steps=(1, 5)):
    """Random token sequences of unlike lengths."""
    g = torch.Generator().manual_seed(seed)
    ints = lambda low, high, k: torch.randint(low, high, (k,), generator=g).tolist()
    rows = []
    for i in range(n):
        question = ints(0, 40, ints(2, 9, 1)[0])
        text = [ints(0, 40, ints(1, 5, 1)[0]) for _ in range(ints(*steps, 1)[0])]
        rows.append(Encoded(question, text, ints(0, 40, 2) + [EOS], Example("q", (), "1", f"row:{i}")))
    return rows


def read(model, embeds):
    """Last hidden state of a list of embeddings, one uncached pass."""
    dtype = model.embed_tokens.weight.dtype
    return model.hidden(embeds=torch.stack([e.to(dtype) for e in embeds])[None])[0, -1]


def embed(model, ids):
    return list(model.embed_tokens(torch.tensor(ids)))


def pick(logits, u):
    """Inverse transform sampling of one row, or argmax."""
    if u is None:
        return int(logits.argmax())
    total = 0.0
    p = logits.softmax(0)
    for i, x in enumerate(p.tolist()):
        total += x
        if total > u * float(p.sum()):
            return i
    return len(p) - 1


def ends(model):
    """The ids that end a text: the tokenizer's, and all of a list in config.json."""
    listed = model.policy.config.eos_token_id
    return {model.config.eos_id} | set(listed if isinstance(listed, list) else [])


def rollout(model, question, noise=None, row=0, max_tokens=16, temperature=1.0):
    """One question, one row: latents (list of (c, d)), answer tokens, and each decision's log-probability."""
    cfg, policy = model.config, model.policy
    seq = embed(policy, question + ([cfg.start_id] if cfg.latent else []))
    plan, latent_logp, stop_logp = [], [], []
    for k in range(cfg.max_steps if cfg.latent else 0):
        step, logps, stopping = [], [], False
        for j in range(cfg.thoughts_per_step):
            h = read(policy, seq)
            if cfg.head:
                mu, logvar = model.latent_head(h)
                z, sigma = mu, (logvar / 2).exp()
                if cfg.vae and noise is not None:
                    z = mu + sigma * noise.latent[row, k, j]
                if cfg.vae:
                    normal = torch.distributions.Normal(mu, sigma)
                    logps.append(float(normal.log_prob(z).sum()))
            else:
                z = h
            if j == 0 and cfg.stop:
                logp = model.stop_head(z).log_softmax(0)
                greedy = noise is None or temperature < 1e-3
                stopping = float(logp[1].exp()) > (0.5 if greedy else float(noise.stop[row, k]))
                stop_logp.append(float(logp[int(stopping)]))
                if stopping:
                    break
            step.append(z)
            seq.append(z)
        if stopping:
            break
        plan.append(torch.stack(step))
        latent_logp.append(logps)
    if cfg.latent:
        seq += embed(policy, [cfg.end_id])
    tokens, token_logp = [], []
    for i in range(max_tokens):
        logits = policy.logits(read(policy, seq))[:cfg.vocab_size] / temperature
        tokens.append(pick(logits, None if noise is None else float(noise.answer[row, i])))
        token_logp.append(float(logits.log_softmax(0)[tokens[-1]]))
        seq += embed(policy, [tokens[-1]])
        if tokens[-1] in ends(model):
            break
    return plan, tokens, latent_logp, stop_logp, token_logp


def sft_losses(model, example, stage, noise=None):
    """The loss parts of one example, from the definitions (paper, section 3.2), a pass per position."""
    cfg, policy = model.config, model.policy
    n = 0 if not cfg.latent else min(stage, cfg.max_steps)
    if cfg.stop:
        n = min(n, len(example.steps))
    text_steps = [] if cfg.method == "nocot" or (cfg.latent and stage >= cfg.max_steps) else example.steps[n:]
    text = sum(text_steps, []) + example.answer
    seq = embed(policy, example.question + ([cfg.start_id] if n else []))
    zs, kl, stops = [], [], []
    for k in range(n + 1 if n and cfg.stop and n == len(example.steps) and n < cfg.max_steps else n):
        step = []
        for j in range(cfg.thoughts_per_step):
            h = read(policy, seq)
            z = h
            if cfg.head:
                mu, logvar = model.latent_head(h)
                z = mu + ((logvar / 2).exp() * noise[k, j] if cfg.vae else 0)
            if j == 0 and cfg.stop:
                stops.append(-model.stop_head(z).log_softmax(0)[int(k == n)])
            if k == n:
                break
            if cfg.vae:
                normal = torch.distributions.Normal(mu, (logvar / 2).exp())
                kl.append(torch.distributions.kl_divergence(normal, torch.distributions.Normal(
                    torch.zeros_like(mu), torch.ones_like(mu))).mean())
            step.append(z)
            seq.append(z)
        if k < n:
            zs.append(torch.stack(step))
    if n:
        seq += embed(policy, [cfg.end_id])
    answer = []
    for t in text:
        answer.append(-policy.logits(read(policy, seq)).log_softmax(0)[t])
        seq += embed(policy, [t])
    losses = {"answer": torch.stack(answer).sum()}  # the caller divides by the target tokens of the batch
    if n and cfg.stop:
        losses["stop"] = torch.stack(stops).mean()
    if n and cfg.vae:
        losses["kl"] = torch.stack(kl).mean()
    if n and cfg.decode:
        per_step = []
        for k in range(n):
            if k >= len(example.steps):  # an idle step of a fixed number of steps: it decodes the answer
                words = example.answer   # which ends with <eos>
            elif k == cfg.max_steps - 1:  # the last step stands for all the rest
                words = sum(example.steps[k:], []) + [cfg.eos_id]
            else:
                words = example.steps[k] + [cfg.eos_id]
            inputs, log_likelihood = list(zs[k]), 0
            for w in words:
                log_likelihood += model.decoder.logits(read(model.decoder, inputs)).log_softmax(0)[w]
                inputs += embed(model.decoder, [w])
            per_step.append(-log_likelihood)  # summed over the tokens: an evidence bound
        losses["decode"] = torch.stack(per_step).mean()
    return losses, len(text)
