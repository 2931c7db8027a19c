"""The head on hidden states: its artifact, and what csrc/engine/length_head.cc computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from deinfer.perception.bins import Bins

Floats = NDArray[np.float64]
_FORMAT = "deinfer.length_head"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """Standardize, linear or one hidden layer, softmax over bins, calibration.

    Attributes:
        shift: Of the inputs [inputs].
        scale: Of the inputs [inputs]; input i becomes (x - shift) * scale.
        hidden: Weight [units, inputs] and bias [units] of a layer with ReLU, if there is one.
        output: Weight [bins, units or inputs] and bias [bins].
        temperature: Divides the logits.
        levels_from: Knots of the calibration of the cumulative distribution, from 0 to 1.
        levels_to: What they become, from 0 to 1.
    """

    shift: Floats
    scale: Floats
    output: tuple[Floats, Floats]
    hidden: tuple[Floats, Floats] | None = None
    temperature: float = 1.0
    levels_from: Floats = field(default_factory=lambda: np.array([0.0, 1.0]))
    levels_to: Floats = field(default_factory=lambda: np.array([0.0, 1.0]))

    def logits(self, x: NDArray[np.floating[Any]]) -> Floats:
        """Logits of inputs [n, inputs]."""
        y = (np.asarray(x, np.float64) - self.shift) * self.scale
        if self.hidden is not None:
            y = np.maximum(y @ self.hidden[0].T + self.hidden[1], 0.0)
        return np.asarray(y @ self.output[0].T + self.output[1])

    def calibrate(self, logits: Floats, open_bins: NDArray[np.bool_]) -> Floats:
        """Probabilities [n, bins] of logits, over the bins that are open [n, bins]."""
        masked = np.where(open_bins, logits / self.temperature, -np.inf)
        weights = np.exp(masked - masked.max(axis=1, keepdims=True))
        below = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
        mapped = np.interp(below, self.levels_from, self.levels_to)
        mapped[:, -1] = 1.0
        return np.diff(mapped, axis=1, prepend=0.0)


@dataclass(frozen=True, slots=True)
class LengthHead:
    """A trained head.

    Attributes:
        layer: The hidden state that it reads, numbered as transformers does.
        refine_every: It looks again after every so many generated tokens.
        hidden_size: Of the model.
        num_layers: Of the model.
        bins: Of the lengths.
        prompt: Stage that reads the state of the prompt's last token.
        refined: Stage that reads (state, mean of the states so far, log of the generated tokens,
            logits of the prompt's stage less their mean).
        report: How it was trained, for people.
    """

    layer: int
    refine_every: int
    hidden_size: int
    num_layers: int
    bins: Bins
    prompt: Stage
    refined: Stage
    report: Mapping[str, Any] = field(default_factory=dict)

    def predict_prompt(self, states: NDArray[np.floating[Any]]) -> Floats:
        """Probabilities of the bins [n, bins] from the prompts' last states [n, hidden]."""
        everything = np.ones((len(states), len(self.bins.lengths)), np.bool_)
        return self.prompt.calibrate(self.prompt.logits(states), everything)

    def predict_refined(
        self,
        states: NDArray[np.floating[Any]],
        means: NDArray[np.floating[Any]],
        generated: NDArray[np.int64],
        prompt_states: NDArray[np.floating[Any]],
    ) -> Floats:
        """Probabilities of the bins [n, bins] while answers are generated.

        Args:
            states: Of the newest tokens [n, hidden].
            means: Of the states so far [n, hidden].
            generated: Tokens [n], >= 1.
            prompt_states: Of the prompts' last tokens [n, hidden].
        """
        x = refined_inputs(states, means, generated, self.prompt.logits(prompt_states))
        return self.refined.calibrate(self.refined.logits(x), self.bins.open(generated))

    def save(self, directory: Path, name: str = "hidden_state") -> Path:
        """Write NAME.json and NAME.safetensors.

        Args:
            directory: Made if it is missing; MODEL/perception is where the engine looks.
            name: Of the files.

        Returns:
            Path of the JSON file.
        """
        directory.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Floats] = {}
        stages = {}
        for key, stage in (("prompt", self.prompt), ("refined", self.refined)):
            tensors[f"{key}.shift"], tensors[f"{key}.scale"] = stage.shift, stage.scale
            tensors[f"{key}.output.weight"], tensors[f"{key}.output.bias"] = stage.output
            if stage.hidden is not None:
                tensors[f"{key}.hidden.weight"], tensors[f"{key}.hidden.bias"] = stage.hidden
            stages[key] = {
                "temperature": stage.temperature,
                "levels_from": stage.levels_from.tolist(),
                "levels_to": stage.levels_to.tolist(),
            }
        entry = {
            "format": _FORMAT,
            "version": _VERSION,
            "predictor": "hidden_state",
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "layer": self.layer,
            "refine_every": self.refine_every,
            "edges": self.bins.edges.tolist(),
            "lengths": self.bins.lengths.tolist(),
            "weights": f"{name}.safetensors",
            "stages": stages,
            "report": dict(self.report),
        }
        save_file(
            {key: np.ascontiguousarray(value, np.float32) for key, value in tensors.items()},
            directory / f"{name}.safetensors",
        )
        path = directory / f"{name}.json"
        path.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> LengthHead:
        """Read what `save` has written.

        Args:
            path: The JSON file.

        Returns:
            The head.

        Raises:
            ValueError: It is missing or of another format.
        """
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no length head: {error}") from None
        if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
            raise ValueError(f"{path} is no length head")
        if entry["version"] != _VERSION:
            raise ValueError(f"{path} has version {entry['version']}; known is {_VERSION}")
        tensors = {
            key: value.astype(np.float64)
            for key, value in load_file(path.parent / entry["weights"]).items()
        }

        def stage(key: str) -> Stage:
            levels = entry["stages"][key]
            hidden = None
            if f"{key}.hidden.bias" in tensors:
                hidden = (tensors[f"{key}.hidden.weight"], tensors[f"{key}.hidden.bias"])
            return Stage(
                shift=tensors[f"{key}.shift"],
                scale=tensors[f"{key}.scale"],
                output=(tensors[f"{key}.output.weight"], tensors[f"{key}.output.bias"]),
                hidden=hidden,
                temperature=levels["temperature"],
                levels_from=np.array(levels["levels_from"]),
                levels_to=np.array(levels["levels_to"]),
            )

        return cls(
            layer=entry["layer"],
            refine_every=entry["refine_every"],
            hidden_size=entry["hidden_size"],
            num_layers=entry["num_layers"],
            bins=Bins(np.array(entry["edges"]), np.array(entry["lengths"])),
            prompt=stage("prompt"),
            refined=stage("refined"),
            report=entry["report"],
        )


def refined_inputs(
    states: NDArray[np.floating[Any]],
    means: NDArray[np.floating[Any]],
    generated: NDArray[np.int64],
    logits: NDArray[np.floating[Any]],
) -> NDArray[np.float32]:
    """Inputs [n, 2 hidden + 1 + bins] of the refined stage.

    Args:
        states: [n, hidden].
        means: Of the states so far [n, hidden].
        generated: Tokens [n], >= 1.
        logits: Of the prompt's stage [n, bins].
    """
    time = np.log(np.asarray(generated, np.float32))[:, None]
    prior = logits - logits.mean(axis=1, keepdims=True)
    return np.concatenate([states, means, time, prior], axis=1, dtype=np.float32)
