"""The OpenAPI document as a page to read: no script, nothing loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
code,pre{font:14px/1.4 ui-monospace,monospace;background:#f2f2f0;border-radius:4px;padding:.1em .3em}
pre{padding:.8em;overflow:auto}h2{margin-top:2.5rem;border-top:1px solid #ddd;padding-top:1rem}
summary{cursor:pointer}table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25em .6em;
border-bottom:1px solid #eee;vertical-align:top}b.m{display:inline-block;min-width:4.5em;text-transform:uppercase}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}code,pre{background:#262626}td,th{border-color:#333}}
"""
_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "maxProperties": "at most {} entries",
    "pattern": "matches {}",
}
_REQUIRED_EXAMPLES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
    "prompt": "Once upon a time",
    "input": "Once upon a time",
    "tokens": [1, 2, 3],
    "endpoint": "completions",
    "max_tokens": 64,
}


def page(document: dict[str, Any]) -> str:
    """Render an OpenAPI document."""
    info = document["info"]
    title = f"{info['title']} {info['version']}"
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
    intro = (
        f"<h1>{escape(title)}</h1><p>The same for machines: <a href=openapi.json>openapi.json</a>. Where the server "
        "has API keys, send one as <code>Authorization: Bearer &lt;key&gt;</code>.</p>"
    )
    return "".join([head, intro, *_operations(document), *_schemas(document)])


def _operations(document: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Endpoints</h2>"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"<details><summary><b class=m>{method}</b> <code>{escape(path)}</code> "
            yield f"{escape(operation['summary'])}</summary>"
            yield f"<pre>{escape(_curl(document, method, path, operation))}</pre>"
            if parameters := operation.get("parameters"):
                fields = {parameter["name"]: parameter["schema"] for parameter in parameters}
                yield _table(fields, [p["name"] for p in parameters if p.get("required")])
            for media, content in operation.get("requestBody", {}).get("content", {}).items():
                schema = content["schema"]
                yield f"<p>Body: {_type(schema)} as <code>{escape(media)}</code></p>"
                if "properties" in schema:
                    yield _table(schema["properties"], schema["required"])
            yield from _answers(operation["responses"])
            yield "</details>"


def _answers(responses: dict[str, Any]) -> Iterator[str]:
    for status, response in responses.items():
        for media, content in response["content"].items():
            schema = content["schema"]
            what = escape(schema["description"]) if "description" in schema else _type(schema)
            when = "Otherwise" if status == "default" else status
            yield f"<p>{when}, as <code>{escape(media)}</code>: {what}</p>"


def _curl(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    """Return a line to paste, with what the body must have."""
    line = f"curl http://localhost:8000{path}" + (f" -X {method.upper()}" if method == "delete" else "")
    body = operation.get("requestBody", {}).get("content", {})
    if "multipart/form-data" in body:
        return f"{line} -F purpose=batch -F file=@requests.jsonl"
    if not body:
        return line + (" -X POST" if method == "post" else "")
    name = body["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    schema = document["components"]["schemas"][name]
    required = schema.get("required") or [key for key in ("input", "prompt") if key in schema["properties"]][:1]
    example: dict[str, Any] = {key: _REQUIRED_EXAMPLES.get(key, "...") for key in required}
    if name == "BatchBody":
        example["prompts"] = ["One", "Two"]
    return f"{line} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(example)}'"


def _schemas(document: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Types</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f"<h3 id={escape(name)}>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p>"
        if "properties" in schema:
            yield _table(schema["properties"], schema.get("required", ()))
        else:
            yield f"<p>{_type(schema)}</p>"


def _table(fields: dict[str, Any], required: Any) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}<td>{_type(schema)}"
        for name, schema in fields.items()
    )
    return f"<table><tr><th>field<th>what it may be{rows}</table>"


def _type(schema: dict[str, Any]) -> str:
    """Say in words what a schema allows; null, which means absent everywhere, is left out."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[1])
        return f"<a href=#{name}>{name}</a>"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(option) for option in options if option.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "anything")
    words = escape(kind if isinstance(kind, str) else " or ".join(kind))
    if "items" in schema:
        words = f"list of ({_type(schema['items'])})"
    elif isinstance(schema.get("additionalProperties"), dict):
        words = f"object of ({_type(schema['additionalProperties'])})"
    limits = [text.format(schema[key]) for key, text in _LIMITS.items() if key in schema]
    return words + (f", {escape(', '.join(limits))}" if limits else "")
