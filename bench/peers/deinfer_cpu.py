"""Driver of this runtime."""

from __future__ import annotations

import argparse

from protocol import Driver, Tokens, serve


def load(options: argparse.Namespace) -> Driver:
    """As a user gets it, but for a KV cache that leaves memory to the others."""
    from deinfer import LLM, SamplingParams, __version__

    llm = LLM(
        options.model,
        dtype=options.dtype,
        num_threads=len(options.cpus),
        kv_cache_bytes=1 << 30,
        use_tqdm_on_load=False,
    )

    def generate(prompts: Tokens, new: int) -> Tokens:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    info = llm.model_info
    return Driver({"deinfer": __version__, "isa": info.isa, "dtype": info.dtype}, generate)


if __name__ == "__main__":
    serve(load)
