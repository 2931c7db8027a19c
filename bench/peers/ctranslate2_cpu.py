"""Driver of CTranslate2; --model is what ct2-transformers-converter made."""

from __future__ import annotations

import argparse
import json

from protocol import Driver, Tokens, serve, versions


def load(options: argparse.Namespace) -> Driver:
    """One model, all threads on one batch."""
    import ctranslate2

    generator = ctranslate2.Generator(
        str(options.model),
        device="cpu",
        compute_type=options.dtype,
        inter_threads=1,
        intra_threads=len(options.cpus),
    )
    # It takes its own names of tokens, and gives ids.
    names = json.loads((options.model / "vocabulary.json").read_text())

    def generate(prompts: Tokens, new: int) -> Tokens:
        results = generator.generate_batch(
            [[names[token] for token in prompt] for prompt in prompts],
            beam_size=1,
            sampling_topk=1,
            min_length=new,  # this is how it ignores end-of-sequence
            max_length=new,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return Driver({**versions("ctranslate2"), "compute_type": generator.compute_type}, generate)


if __name__ == "__main__":
    serve(load)
