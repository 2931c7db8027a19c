"""Driver of Hugging Face transformers: its own generate(); in float32 also the reference."""

from __future__ import annotations

import argparse

from protocol import Driver, Tokens, serve, versions


def load(options: argparse.Namespace) -> Driver:
    """The model in eager mode with sdpa attention, transformers' default."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(options.cpus))
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), local_files_only=True
    ).eval()

    @torch.inference_mode()
    def generate(prompts: Tokens, new: int) -> Tokens:
        longest = max(map(len, prompts))
        # Padded on the left, so that all continue at the same column.
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[:, longest:].tolist()

    @torch.inference_mode()
    def score(prompts: Tokens, answers: Tokens) -> tuple[Tokens, list[list[float]]]:
        choices, gaps = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
            best, choice = logits.max(dim=1)
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            choices.append(choice.tolist())
            gaps.append((best - chosen).tolist())
        return choices, gaps

    return Driver(versions("transformers", "torch"), generate, score)


if __name__ == "__main__":
    serve(load)
