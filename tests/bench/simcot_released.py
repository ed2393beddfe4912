"""The work of tests/bench/bench.py as the released SIM-CoT code does it."""

import tempfile

import torch
import torch.nn.functional as F


class Published:
    """The same work as the released SIM-CoT code does it (InternLM/SIM-CoT, Coconut/coconut.py), with
    transformers' LLaMA of today: K x c latents for every row, hidden states fed back; the embeddings cut into
    single vectors and put together again at every latent; logits over the vocabulary at all positions, of the
    question too; a pass of the decoder a step, padded; plain AdamW; answers one question at a time, the whole
    sequence read once more before the first word. Ours does more besides: heads, sampling, the KL term, a
    decision to stop."""

    def __init__(self, b):
        from transformers import LlamaForCausalLM
        self.b, self.latents, self.config = b, b.spec["K"] * b.spec["c"], b.model.config
        with tempfile.TemporaryDirectory() as folder:
            b.model.policy.save_pretrained(folder)
            b.model = None
            read = lambda: LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(b.device)
            self.policy, self.decoder = read(), read()
        self.embed = self.policy.get_input_embeddings()
        self.optimizer = torch.optim.AdamW([*self.policy.parameters(), *self.decoder.parameters()], lr=1e-6)

    def padded(self, rows, value=0, left=False):
        width = max(map(len, rows))
        fill = lambda row: [value] * (width - len(row))
        return torch.tensor([fill(r) + r if left else r + fill(r) for r in rows], device=self.b.device)

    def think(self, questions, texts):
        """embeds with the latents filled in, logits at all positions, place of the first latent."""
        asked = self.padded([q + [self.config.start_id] for q in questions], -1, left=True)
        ids = torch.cat((asked, asked.new_zeros(len(asked), self.latents), self.padded(texts, -1)), dim=1)
        mask, P = (ids >= 0).long(), asked.shape[1]
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        embeds, cache, logits, start = self.embed(ids.clamp(min=0)), None, [], 0
        for end in range(P, P + self.latents + 1):
            end = ids.shape[1] if end == P + self.latents else end
            out = self.policy(inputs_embeds=embeds[:, start:end], attention_mask=mask[:, :end],
                              position_ids=places[:, start:end], past_key_values=cache, use_cache=True,
                              output_hidden_states=True)
            cache, start = out.past_key_values, end
            logits.append(out.logits)
            if end < ids.shape[1]:
                rows = [[embeds[i, t] for t in range(embeds.shape[1])] for i in range(len(embeds))]
                for i, row in enumerate(rows):
                    row[end] = out.hidden_states[-1][i, -1]
                embeds = torch.stack([torch.stack(row) for row in rows])
        return embeds, torch.cat(logits, dim=1), P

    def step(self, examples):
        K, c = self.b.spec["K"], self.b.spec["c"]
        loss_of = lambda logits, ids: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        ends = [[self.config.end_id] + e.answer for e in examples]
        embeds, logits, P = self.think([e.question for e in examples], ends)
        answers = self.padded([e.answer for e in examples], -100)
        loss = loss_of(logits, F.pad(answers, (P + K * c + 1, 0), value=-100))
        for k in range(K):
            # a row without so many steps writes its answer again
            texts = [sum(e.steps[k:None if k == K - 1 else k + 1], []) or e.answer[:-1] for e in examples]
            labels = self.padded([[-100] * c + t + [self.config.eos_id] for t in texts], -100)
            words = self.embed(labels[:, c:].clamp(min=0))
            inputs = torch.cat((embeds[:, P + k * c:P + (k + 1) * c], words), dim=1)
            mask = F.pad(labels[:, c:] >= 0, (c, 0), value=True).long()
            place = torch.arange(1, labels.shape[1] + 1, device=labels.device).expand(len(labels), -1)
            out = self.decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=place,
                               output_hidden_states=True)
            loss = loss + loss_of(out.logits, labels) / K
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def answer(self, e):
        embeds, *_ = self.think([e.question], [[self.config.end_id]])
        out = self.policy(inputs_embeds=embeds, use_cache=True)
        for _ in range(15):
            token = out.logits[:, -1].argmax(dim=-1)
            out = self.policy(inputs_embeds=self.embed(token)[:, None], past_key_values=out.past_key_values,
                              use_cache=True)
