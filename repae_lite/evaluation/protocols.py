"""Protocols: everything that a number depends on besides the weights, under a name.

Two numbers may stand in one column only if their protocols have the same hash. `adm-…` are those of the
paper's tables: 50,000 images judged as ADM's evaluator does, against its reference file of ImageNet's
training set. Labels drawn at random and balanced ones are two protocols: 1.83 and 1.69 for the same weights
(paper, version 1 and Table 9).
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from repae_lite.evaluation.generate import Drawing, Sampling
from repae_lite.utils.configs import checked_config
from repae_lite.utils.yaml_files import converted, read_yaml

METRICS = ("frechet", "spatial_frechet", "inception_score", "precision", "recall", "kernel_distance")
BY_JUDGE = {  # what each can measure
    "inception": METRICS,
    "inception-random": METRICS,
    "tiny": tuple(name for name in METRICS if name != "spatial_frechet"),  # it has no spatial features
}
DINO = "frechet_dinov2"  # on request only: it needs a network of its own, see `DinoFeatures`
PRECISION = "float32 features, float64 statistics"


@dataclass(frozen=True, kw_only=True)
class Protocol(Drawing):
    """How images are drawn, see `Drawing`, and judged.

    Attributes:
        judge: the network that features come from, see `repae_lite.evaluation.features.load_judge`.
        metrics: which of `METRICS` are computed, as far as the judge can, and perhaps `DINO`.
        reference: SHA-256 of the reference (its first digits are enough); None takes any, and records which.
        neighbours: of precision and recall.
        chunk: images of a chunk of the Inception Score.
        precision: of features and statistics.
    """

    mode: str = "sde"
    steps: int = 250
    judge: str = "inception"
    metrics: tuple[str, ...] = METRICS
    reference: str | None = None
    neighbours: int = 3
    chunk: int = 5000
    precision: str = PRECISION

    def __post_init__(self):
        super().__post_init__()
        if self.judge not in BY_JUDGE:
            raise ValueError(f"judge is {self.judge!r}: choose inception or tiny")
        known = (*BY_JUDGE[self.judge], DINO)
        if not self.metrics or not set(self.metrics) <= set(known):
            raise ValueError(
                f"metrics are {list(self.metrics)}: choose among {', '.join(known)}, which the judge "
                f"{self.judge} has"
            )
        for name in ("neighbours", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        least = 1 + (self.neighbours if {"precision", "recall"} & set(self.metrics) else 1)
        if self.count < least:
            raise ValueError(f"count is {self.count}: its metrics need at least {least} images")
        if self.precision != PRECISION:
            raise ValueError(f"precision is {self.precision!r}: the only one is {PRECISION!r}")

    def sampling(self, seed: int = 0, path_type: str = "linear") -> Sampling:
        """The half that `repae generate` needs."""
        shared = {name: getattr(self, name) for name in _SAMPLING}
        return Sampling(seed=seed, path_type=path_type, **shared)

    def with_sampling(self, sampling: dict) -> "Protocol":
        """This protocol with the guidance that the samples were drawn with, which each model has its own of.

        Raises:
            ValueError: the samples were drawn in another way otherwise: the first difference.
        """
        for name in _SAMPLING:
            drawn, wanted = sampling.get(name), getattr(self, name)
            if name not in GUIDANCE and drawn != wanted:
                raise ValueError(
                    f"the samples have {name} {drawn!r}, and the protocol {wanted!r}: draw them by that "
                    "protocol, or judge them by their own"
                )
        return replace(self, **{name: sampling[name] for name in GUIDANCE})

    def record(self, **found: object) -> dict:
        """The protocol as JSON values with its hash.

        Args:
            found: what is only known when it is carried out, such as the hashes of judge and reference.
        """
        values = asdict(self) | {"metrics": list(self.metrics)} | found
        return values | {"hash": hash_of(values)}


GUIDANCE = ("cfg_scale", "guidance_low", "guidance_high")
_SAMPLING = tuple(field.name for field in fields(Drawing))
_ODE = {"mode": "ode", "steps": 50}
PROTOCOLS = {
    "adm-sde250-random": Protocol(),
    "adm-sde250-balanced": Protocol(labels="balanced"),
    "adm-ode50-random": Protocol(**_ODE),
    "adm-ode50-balanced": Protocol(**_ODE, labels="balanced"),
    "mid": Protocol(**_ODE, labels="balanced", count=5000),
    "tiny": Protocol(
        mode="ode",
        steps=20,
        labels="balanced",
        count=2000,
        to_uint8="round",
        judge="tiny",
        metrics=BY_JUDGE["tiny"],
    ),
}


def load_protocol(name: str) -> Protocol:
    """A protocol by its name, or from a YAML file of the fields of `Protocol`.

    A file without metrics gets all that its judge can measure.

    Raises:
        ValueError, FileNotFoundError: an unknown name, or a file that is none.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}, or give a YAML file"
        )
    values, kinds = read_yaml(path, "protocol"), {field.name: field.type for field in fields(Protocol)}
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"the protocol {path} sets {key!r}, which it does not have: take it out")
        if key != "metrics":
            kind = str if kinds[key] == str | None else kinds[key]
            values[key] = converted(value, kind, f"{key} in the protocol {path}")
    values.setdefault("metrics", BY_JUDGE.get(values.get("judge"), METRICS))
    return checked_config(Protocol, values, path)


def hash_of(record: dict) -> str:
    """The hash of a protocol's record; its name and hash do not count."""
    values = {key: value for key, value in record.items() if key not in ("name", "hash")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(a: dict, b: dict) -> list[str]:
    """What two records of protocols differ in, each as "field: this, that"."""
    fields = [name for name in dict.fromkeys([*a, *b]) if name not in ("hash", "name")]
    return [f"{name}: {a.get(name)!r}, {b.get(name)!r}" for name in fields if a.get(name) != b.get(name)]
