"""The application for Ray Serve: `serve run trio_llm.ray_serve.app:build config=config.yaml num_replicas=2`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

try:
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
except ImportError:
    raise ImportError("replicas on Ray Serve need Ray: pip install 'trio-llm[ray]'") from None

from trio_llm.assemble import open_engine
from trio_llm.cli.serve import UNWIND_S
from trio_llm.config import Config
from trio_llm.ray_serve.options import Options
from trio_llm.ray_serve.replica import OpenEngine, Replica
from trio_llm.server.app import check_settings

NAME = "trio-llm"
# Longer than the time between two reports of a replica, as Ray demands.
_SHORTEST_LOOK_BACK_S = 11.0


@serve.ingress()
class Deployment:
    """Ray's names for what a replica does."""

    async def __init__(self, config: Config, owns_batches: bool, open_engine: OpenEngine) -> None:
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(config, name=name, owns_batches=owns_batches, open_engine=open_engine)
        await self._replica.open()

    def __serve_build_asgi_app__(self) -> Replica:
        return self._replica

    async def check_health(self) -> None:
        await self._replica.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return await self._replica.load()


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """Check the arguments, see `Options`, and return the application. Ray calls it, with nothing else.

    Raises:
        ConfigError: An argument or a setting is not allowed.
    """
    return application(arguments, open_engine)


def application(arguments: Mapping[str, Any], open_engine: OpenEngine) -> serve.Application:
    """Return the application whose replicas open their engines so. Raises what `build` raises."""
    options = Options.parse(arguments, os.environ)
    check_settings(options.config)
    deployment = serve.deployment(
        name=NAME,
        # The router skips a replica that is full. As many as fit into all may wait in it: a burst waits for a moment.
        max_ongoing_requests=options.num_places,
        max_queued_requests=options.num_places * (options.max_replicas or options.num_replicas),
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=options.config.server.shutdown_timeout_s + UNWIND_S,
        **_replicas(options),
        **_router(options),
    )(Deployment)
    return deployment.bind(options.config, options.owns_batches, open_engine)


def _replicas(options: Options) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.num_replicas}
    scaling = AutoscalingConfig(
        min_replicas=options.num_replicas,
        max_replicas=options.max_replicas,
        target_ongoing_requests=options.config.engine.max_batch_size,
        look_back_period_s=max(options.upscale_delay_s, _SHORTEST_LOOK_BACK_S),
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function="trio_llm.ray_serve.autoscaling:engine_queue_policy"),
    )
    return {"autoscaling_config": scaling}


def _router(options: Options) -> dict[str, Any]:
    if not options.prefix_affinity:
        return {}
    return {"request_router_config": {"request_router_class": "trio_llm.ray_serve.prefix_router:PrefixRouter"}}
