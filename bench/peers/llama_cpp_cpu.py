"""Driver of llama.cpp through the low-level API of llama-cpp-python; --model is a GGUF file.

Batches as llama.cpp's own llama-batched-bench does: every sequence in one llama_batch.
"""

from __future__ import annotations

import argparse

from protocol import Driver, Tokens, serve, versions

BATCH = 2048  # tokens of one llama_decode, llama.cpp's default

Entry = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


def load(options: argparse.Namespace) -> Driver:
    """A context with a KV cache of its own for each sequence, llama.cpp's default."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(options.model).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {str(options.model)!r}")
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max = options.max_batch
    params.n_ctx = options.max_batch * options.max_tokens
    params.n_batch = BATCH
    params.n_threads = params.n_threads_batch = len(options.cpus)
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    memory = llama_cpp.llama_get_memory(context)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def decode(entries: list[Entry]) -> list[int]:
        """Run up to BATCH tokens; the likeliest next token of each entry that wants logits."""
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for {len(entries)} tokens")
        rows = sum(entry[3] for entry in entries)
        if rows == 0:
            return []
        logits = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(logits, (rows, vocabulary)).argmax(axis=1).tolist()

    def generate(prompts: Tokens, new: int) -> Tokens:
        llama_cpp.llama_memory_clear(memory, False)
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        last: list[int] = []
        for start in range(0, len(entries), BATCH):
            last += decode(entries[start : start + BATCH])
        steps = [last]
        for step in range(new - 1):
            last = decode(
                [
                    (token, len(prompts[sequence]) + step, sequence, True)
                    for sequence, token in enumerate(last)
                ]
            )
            steps.append(last)
        return [list(answer) for answer in zip(*steps, strict=True)]

    info = {**versions("llama-cpp-python"), "weights": options.dtype}
    info["system_info"] = llama_cpp.llama_print_system_info().decode()
    return Driver(info, generate)


if __name__ == "__main__":
    serve(load)
