"""Replicas on Ray Serve: `serve run trio_llm.ray_serve.app:build config=config.yaml num_replicas=2`.

Only `app` and `prefix_router` import Ray. Nothing outside this package knows of it.
"""
