"""What `serve run` and Serve's config files say of the replicas, checked before Ray starts one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from trio_llm.cli.settings import given_in, load_settings
from trio_llm.config import Config
from trio_llm.errors import ConfigError

_SOURCE = "the arguments of the application"


@attrs.frozen(kw_only=True)
class Options:
    """The arguments of the application.

    Attributes:
        config: The settings of `trio-llm serve`; every replica has the same.
        num_replicas: Number of replicas; with `max_replicas`, the least number.
        max_replicas: Scale up to this number with the engines' queues. None does not scale.
        upscale_delay_s: Time for which the queues have been long before that.
        downscale_delay_s: Time for which fewer replicas would do before one is removed.
        num_gpus: GPUs of each replica; a part of one shares it, if the settings limit the KV cache.
        num_cpus: Cores that Ray reserves for each replica.
        owns_batches: This one replica has files and batches; there is never another.
        prefix_affinity: Send requests that begin alike to one replica.
    """

    config: Config
    num_replicas: int = 1
    max_replicas: int | None = None
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    owns_batches: bool = False
    prefix_affinity: bool = True

    @classmethod
    def parse(cls, arguments: Mapping[str, Any], environ: Mapping[str, str]) -> Options:
        """Check the arguments: text from the command line, typed values from a config file.

        Raises:
            ConfigError: An argument or a setting is unknown or has a value that is not allowed.
        """
        known = [field.name for field in attrs.fields(cls)]
        for name, value in arguments.items():
            if name not in known:
                raise ConfigError(name, value, _SOURCE, f"unknown argument; there are {', '.join(known)}")
        options = cls(
            config=_config(arguments.get("config"), environ),
            num_replicas=_number(arguments, "num_replicas", int, 1, at_least=1),
            max_replicas=_number(arguments, "max_replicas", int, None, at_least=1),
            upscale_delay_s=_number(arguments, "upscale_delay_s", float, 30.0, at_least=1),
            downscale_delay_s=_number(arguments, "downscale_delay_s", float, 600.0, at_least=1),
            num_gpus=_number(arguments, "num_gpus", float, 0.0, at_least=0),
            num_cpus=_number(arguments, "num_cpus", float, 1.0, at_least=0),
            owns_batches=_flag(arguments, "owns_batches", default=False),
            prefix_affinity=_flag(arguments, "prefix_affinity", default=True),
        )
        return options._checked()

    def _checked(self) -> Options:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            allowed = f"at least num_replicas, which is {self.num_replicas}"
            raise ConfigError("max_replicas", self.max_replicas, _SOURCE, allowed)
        if self.owns_batches and (self.max_replicas or self.num_replicas) > 1:
            raise ConfigError("owns_batches", True, _SOURCE, "true with one replica only: files have one owner")
        engine, server = self.config.engine, self.config.server
        if not self.num_gpus:
            if engine.device == "cuda":
                raise ConfigError("num_gpus", self.num_gpus, _SOURCE, "more than 0 with engine.device cuda")
            engine = attrs.evolve(engine, device="cpu")  # A GPU that Ray did not give belongs to another replica.
        # A replica is stopped by Ray, which would start another one at once.
        return attrs.evolve(
            self, config=attrs.evolve(self.config, engine=engine, server=attrs.evolve(server, enable_shutdown=False))
        )

    @property
    def num_places(self) -> int:
        """Requests that the engine of one replica admits."""
        return self.config.engine.max_batch_size * (1 + self.config.engine.max_waiting_batches)


def _config(given: Any, environ: Mapping[str, str]) -> Config:
    """Load the settings of `trio-llm serve`, from the path of a file or from a mapping of sections."""
    if not isinstance(given, Mapping):
        return load_settings(None if given is None else Path(str(given)), environ, {}).config
    return load_settings(None, environ, given_in(given, _SOURCE)).config


def _number(arguments: Mapping[str, Any], name: str, kind: Any, default: Any, *, at_least: int) -> Any:
    value = arguments.get(name)
    if value is None:
        return default
    try:
        number = kind(str(value))
    except ValueError:
        number = None
    if number is None or not at_least <= number < 1_000_000:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(name, value, _SOURCE, f"must be {what} of at least {at_least}")
    return number


def _flag(arguments: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = str(arguments.get(name, default)).lower()
    if value not in ("true", "false"):
        raise ConfigError(name, arguments[name], _SOURCE, "must be true or false")
    return value == "true"
