"""Settings: every key from every source, who wins, and one clear line for what is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from trio_llm.cli.commands import serve
from trio_llm.cli.options import as_text, flags_given
from trio_llm.cli.settings import Given, Settings, fields, load_settings, unknown_variables
from trio_llm.config import AuthConfig, Config, EngineConfig
from trio_llm.errors import ConfigError

# For every setting three values that differ from its default, for the file, the environment and the flag.
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "server.host": ("127.0.0.1", "127.0.0.2", "127.0.0.3"),
    "server.port": (1, 2, 3),
    "server.log_level": ("debug", "warning", "error"),
    "server.log_dir": ("a", "b", "c"),
    "server.log_stats_interval_s": (1.5, 2.5, 3.5),
    "server.served_model_name": (("a", "b"), ("c",), ("d",)),
    "server.chat_template": ("a", "b", "c"),
    "server.tool_prompt": (False, False, False),
    "server.log_probes": (True, True, True),
    "server.drain_delay_s": (1.5, 2.5, 3.5),
    "server.shutdown_timeout_s": (1.5, 2.5, 3.5),
    "server.data_dir": ("a", "b", "c"),
    "server.otlp_traces_endpoint": ("a", "b", "c"),
    "server.trusted_proxies": (("a", "b"), ("c",), ("d",)),
    "server.allowed_origins": (("a", "b"), ("c",), ("d",)),
    "server.allowed_hosts": (("a", "b"), ("c",), ("d",)),
    "server.allowed_methods": (("a", "b"), ("c",), ("d",)),
    "server.allowed_headers": (("a", "b"), ("c",), ("d",)),
    "server.allow_credentials": (True, True, True),
    "server.sse_keep_alive_interval": (1.5, 2.5, 3.5),
    "server.ui": (False, False, False),
    "server.enable_shutdown": (False, False, False),
    "engine.model": ("a", "b", "c"),
    "engine.revision": ("a", "b", "c"),
    "engine.tokenizer": ("a", "b", "c"),
    "engine.dtype": ("bfloat16", "float16", "float32"),
    "engine.load_format": ("dummy", "dummy", "dummy"),
    "engine.device": ("cpu", "cuda", "cpu"),
    "engine.cpu_threads": (1, 2, 3),
    "engine.gpu_memory_utilization": (0.5, 0.6, 0.7),
    "engine.enforce_eager": (True, True, True),
    "engine.max_model_len": (1, 2, 3),
    "engine.max_batch_size": (1, 2, 3),
    "engine.max_num_batched_tokens": (1, 2, 3),
    "engine.target_step_s": (0.5, 0.0, 1.5),
    "engine.max_waiting_batches": (1, 0, 3),
    "engine.num_kv_blocks": (2, 3, 4),
    "engine.block_size": (8, 32, 64),
    "engine.enable_prefix_caching": (False, False, False),
    "engine.prefix_hash_seed": ("1", "2", "3"),
    "engine.kv_events_config": ("{}", '{"topic": "a"}', '{"hwm": 1}'),
    "engine.long_prefill_token_threshold": (1, 2, 3),
    "engine.scheduling_policy": ("priority", "priority", "priority"),
    "engine.async_scheduling": (False, False, False),
    "engine.kv_quantization": (True, True, True),
    "engine.kv_cache_dtype": ("int8", "fp8", "fp8_e4m3"),
    "engine.quantization": ("int8", "int8", "int8"),
    "engine.tensor_parallel_size": (2, 3, 4),
    "engine.distributed_timeout_s": (1.0, 2.5, 30.0),
    "engine.spec_method": ("ngram", "draft_model", "ngram"),
    "engine.spec_model": ("a", "b", "c"),
    "engine.max_draft_tokens": (1, 2, 3),
    "engine.prompt_lookup_min": (1, 3, 4),
    "engine.prompt_lookup_max": (2, 3, 5),
    "engine.max_logprobs": (1, 2, 3),
    "engine.record": ("a", "b", "c"),
    "engine.record_tokens": (True, True, True),
    "engine.record_max_bytes": (2**30 + 1, 2**30 + 2, 2**30 + 3),
    "engine.seed": (1, 2, 3),
    "auth.api_keys": (("a", "b"), ("c",), ("d",)),
    "auth.api_key_file": ("a", "b", "c"),
    "auth.admin_api_keys": (("a", "b"), ("c",), ("d",)),
    "auth.public_metrics": (True, True, True),
    "auth.require_auth": (True, True, True),
    "auth.rate_limit_requests": (1, 2, 3),
    "auth.rate_limit_tokens": (1, 2, 3),
    "auth.rate_limit_window_secs": (1.5, 2.5, 3.5),
    "limits.strict": (True, True, True),
    "limits.max_body_bytes": (1, 2, 3),
    "limits.max_file_bytes": (1, 2, 3),
    "limits.max_stored_bytes": (1, 2, 3),
    "limits.max_stored_bytes_per_key": (1, 2, 3),
    "limits.max_json_depth": (1, 2, 3),
    "limits.max_json_nodes": (1, 2, 3),
    "limits.max_json_keys": (1, 2, 3),
    "limits.max_json_digits": (1, 2, 3),
    "limits.max_messages": (1, 2, 3),
    "limits.max_prompts": (1, 2, 3),
    "limits.max_inputs": (1, 2, 3),
    "limits.max_n": (1, 2, 3),
    "limits.max_samples": (1, 2, 3),
    "limits.max_caller_share": (0.1, 0.2, 0.3),
    "limits.max_queued_tokens": (1, 2, 3),
    "limits.max_stop_strings": (1, 2, 3),
    "limits.max_stop_bytes": (1, 2, 3),
    "limits.max_stop_token_ids": (1, 2, 3),
    "limits.max_logit_bias": (1, 2, 3),
    "limits.max_metadata_pairs": (1, 2, 3),
    "limits.max_metadata_key_chars": (1, 2, 3),
    "limits.max_metadata_value_chars": (1, 2, 3),
    "limits.max_header_bytes": (256, 257, 258),
    "limits.max_headers": (1, 2, 3),
    "limits.max_connections": (1, 2, 3),
    "limits.max_connections_per_peer": (1, 2, 3),
    "limits.header_timeout_s": (1.5, 2.5, 3.5),
    "limits.body_timeout_s": (1.5, 2.5, 3.5),
    "limits.keep_alive_timeout_s": (1.5, 2.5, 3.5),
    "limits.write_timeout_s": (1.5, 2.5, 3.5),
    "limits.request_timeout_s": (1.5, 2.5, 3.5),
    "limits.template_timeout_s": (1.5, 2.5, 3.5),
    "limits.grammar_timeout_s": (1.5, 2.5, 3.5),
    "limits.max_template_chars": (1, 2, 3),
}
DECLARED = dict(fields())


def value_of(settings: Settings, key: str) -> Any:
    """Read a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(settings.config, section), name)


def written(tmp_path: Path, key: str, value: Any) -> Path:
    """Write a config.yaml that sets one key."""
    section, name = key.split(".")
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({section: {name: list(value) if isinstance(value, tuple) else value}}))
    return path


def text(value: Any) -> str:
    """Write a value as a shell would hold it."""
    return value[0] if isinstance(value, tuple) else as_text(value)


def from_flags(key: str, value: Any, flag: str) -> dict[str, Any]:
    """Give one flag on a real command line and return what click made of it."""
    attribute = DECLARED[key]
    if attribute.type in (bool, bool | None):
        arguments = [flag if value else f"--no-{flag.removeprefix('--')}"]
    else:
        arguments = [
            argument for item in (value if isinstance(value, tuple) else (value,)) for argument in (flag, text(item))
        ]
    context = serve.make_context("serve", arguments)
    return context.params


def test_the_table_covers_every_setting() -> None:
    """A setting that is added without a row in this table is noticed."""
    assert list(VALUES) == list(DECLARED)
    for key, values in VALUES.items():
        assert DECLARED[key].default not in values, key


@pytest.mark.parametrize("key", DECLARED)
def test_the_file_sets_every_key(key: str, tmp_path: Path) -> None:
    """Each key can be set in the file, with its own type, and its source is told."""
    value = VALUES[key][0]
    path = written(tmp_path, key, value)
    settings = load_settings(path, {}, {})
    assert value_of(settings, key) == value
    assert settings.sources[key] == str(path)
    assert set(settings.sources.values()) == {"default", str(path)}


@pytest.mark.parametrize("key", [key for key, attribute in fields() if attribute.metadata["env"]])
def test_the_environment_beats_the_file(key: str, tmp_path: Path) -> None:
    """Each variable wins over the file, which in turn wins over the default."""
    variable = DECLARED[key].metadata["env"]
    value = VALUES[key][1]
    settings = load_settings(written(tmp_path, key, VALUES[key][0]), {variable: text(value)}, {})
    assert value_of(settings, key) == value
    assert settings.sources[key] == f"environment {variable}"


@pytest.mark.parametrize(("key", "flag"), [(key, flag) for key, field in fields() for flag in field.metadata["flags"]])
def test_every_spelling_of_every_flag_beats_environment_and_file(key: str, flag: str, tmp_path: Path) -> None:
    """Each flag, aliases and short forms included, wins over everything else, also to switch something off."""
    value = VALUES[key][2]
    variable = DECLARED[key].metadata["env"]
    environ = {variable: text(VALUES[key][1])} if variable else {}
    settings = load_settings(written(tmp_path, key, VALUES[key][0]), environ, flags_given(from_flags(key, value, flag)))
    assert value_of(settings, key) == value
    assert settings.sources[key] == f"flag {DECLARED[key].metadata['flags'][0]}"


def test_a_flag_that_was_not_given_leaves_the_file_alone(tmp_path: Path) -> None:
    """Defaults of flags never overwrite the file: all keys together survive an empty command line."""
    document: dict[str, dict[str, Any]] = {}
    for key, values in VALUES.items():
        section, name = key.split(".")
        document.setdefault(section, {})[name] = list(values[0]) if isinstance(values[0], tuple) else values[0]
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump(document))
    settings = load_settings(path, {}, flags_given(serve.make_context("serve", []).params))
    assert {key: value_of(settings, key) for key in VALUES} == {key: values[0] for key, values in VALUES.items()}


@pytest.mark.parametrize("name", ["true", "True", "1", "yes", "on", "false", "0", "no", "off"])
def test_switches_are_read_from_text(name: str) -> None:
    """A variable's text switches on or off in the usual spellings."""
    settings = load_settings(None, {"VLLM_KV_QUANTIZATION": name}, {})
    assert settings.config.engine.kv_quantization is (name.lower() in ("true", "1", "yes", "on"))


def test_lists_can_be_written_as_json() -> None:
    """A flag or variable takes a list as vLLM's flags do, and says so where it is none."""
    for text, expected in (('["a", "b"]', ("a", "b")), ("a", ("a",))):
        flag = Given((text,), "flag --allowed-origins")
        assert load_settings(None, {}, {"server.allowed_origins": flag}).config.server.allowed_origins == expected
    for text in ("[a", "[1]"):
        with pytest.raises(ConfigError, match="a text or a list of texts"):
            load_settings(None, {}, {"server.allowed_origins": Given((text,), "flag --allowed-origins")})


def test_an_empty_variable_counts_as_unset() -> None:
    """`VLLM_API_KEY=` in a compose file opens nothing and breaks nothing."""
    assert load_settings(None, {"VLLM_API_KEY": "", "VLLM_PORT": ""}, {}) == load_settings(None, {}, {})


@pytest.mark.parametrize("source", ["file", "environment", "flag"])
@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("server.port", "eight", "must be a whole number"),
        ("server.port", "70000", "must be 0 to 65535"),
        ("engine.num_kv_blocks", "1", "must be at least 2"),
        ("engine.kv_quantization", "perhaps", "must be true or false"),
        ("server.log_level", "loud", "must be one of debug, info, warning, error"),
    ],
)
def test_a_wrong_value_names_key_value_source_and_what_is_allowed(
    source: str, key: str, value: str, allowed: str, tmp_path: Path
) -> None:
    """Whatever the source, the error has all four parts and is one line."""
    variable = DECLARED[key].metadata["env"]
    path = written(tmp_path, key, value) if source == "file" else None
    environ = {variable: value} if source == "environment" else {}
    flags = {key: Given(value, "flag --x")} if source == "flag" else {}
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environ, flags)
    told = {"file": str(path), "environment": f"environment {variable}", "flag": "flag --x"}[source]
    assert str(caught.value) == f"{told}: {key} = {value!r}: {allowed}"


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("server: {prot: 1}", "server.prot = 1: unknown setting; did you mean server.port?"),
        ("engine: {swap_space: 4}", "engine.swap_space = 4: unknown setting"),
        ("sever: {port: 1}", "unknown section; there are server, engine, auth"),
        ("server: 3", "server = 3: must be a mapping of settings"),
        ("- port", "must hold the sections server, engine, auth"),
        ("server:\n  port: 1\n  port: 2", "line 3 = 'port: 2': is not YAML: 'port' occurs twice"),
        ("server: {port: 1", "is not YAML"),
        ("server: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("server: {port: true}", "server.port = True: must be a whole number"),
        ("engine: {seed: 1.5}", "engine.seed = 1.5: must be a whole number"),
        ("engine: {block_size: 12}", "engine.block_size = 12: must be a power of two"),
        ("engine: {model: 3}", "engine.model = 3: must be text, or none"),
        ("engine: {quantization: fp4}", "engine.quantization = 'fp4': must be one of int8, int8-weights, or none"),
        ("auth: {rate_limit_window_secs: .nan}", "must be a finite number"),
        ("auth: {api_keys: [sekrit, 1]}", "auth.api_keys = '***': must be a text or a list of texts"),
    ],
)
def test_a_wrong_file_is_never_swallowed(document: str, told: str, tmp_path: Path) -> None:
    """Unknown keys, doubled keys, wrong types and broken YAML each end in an error that names the place."""
    path = tmp_path / "settings.yaml"
    path.write_text(document)
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {}, {})
    assert told in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    """`--config` with a missing file is an error; only the default ./config.yaml may be missing."""
    with pytest.raises(ConfigError, match=r"--config: file = .*missing\.yaml.*cannot be read"):
        load_settings(tmp_path / "missing.yaml", {}, {})


def test_config_yaml_is_read_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `--config`, ./config.yaml counts where it exists and is not missed where it does not."""
    monkeypatch.chdir(tmp_path)
    assert load_settings(None, {}, {}).config == Config()
    (tmp_path / "config.yaml").write_text("server: {port: 4}")
    assert load_settings(None, {}, {}).config.server.port == 4
    (tmp_path / "config.yaml").write_text("")
    assert load_settings(None, {}, {}).config == Config()


def test_the_shipped_file_states_every_default() -> None:
    """config.yaml in the repository lists all settings and changes none of them."""
    path = Path(__file__).parents[2] / "config.yaml"
    settings = load_settings(path, {}, {})
    assert settings.config == Config()
    assert set(settings.sources.values()) == {str(path)}


def test_unknown_variables_are_told_apart_from_known_ones() -> None:
    """A misspelt VLLM_ variable is pointed out with the one that was meant."""
    environ = {"VLLM_KV_BLOCK": "1", "VLLM_PORT": "1", "PATH": "", "VLLM_NO_USAGE_STATS": "1"}
    assert unknown_variables(environ) == {"VLLM_KV_BLOCK": "VLLM_KV_BLOCKS", "VLLM_NO_USAGE_STATS": None}


@pytest.mark.parametrize(("dtype", "expected"), [("int8", True), ("auto", False), ("fp8", False)])
def test_vllms_kv_cache_dtype_is_kv_quantization(dtype: str, expected: bool, tmp_path: Path) -> None:
    """The name that vLLM gives the INT8 cache sets our key, on and off."""
    path = written(tmp_path, "engine.kv_quantization", not expected)
    result = CliRunner().invoke(serve, ["--print-config", "-c", str(path), "--kv-cache-dtype", dtype])
    assert f"{str(expected).lower():<10}" in next(
        line for line in result.output.splitlines() if line.startswith("engine.kv_quantization")
    )
    assert "flag --kv-cache-dtype" in result.output


@pytest.mark.parametrize(
    ("in_file", "environ", "words", "expected"),
    [
        ({"kv_cache_dtype": "fp8"}, {}, ["--kv-quantization"], (True, "auto")),
        ({"kv_cache_dtype": "int8"}, {}, ["--no-kv-quantization"], (False, "auto")),
        ({"kv_cache_dtype": "fp8"}, {"VLLM_KV_QUANTIZATION": "1"}, [], (True, "auto")),
        ({}, {"VLLM_KV_QUANTIZATION": "1"}, ["--kv-cache-dtype", "fp8"], (False, "fp8")),
        ({"kv_cache_dtype": "fp8", "kv_quantization": True}, {}, [], (True, "fp8")),
    ],
)
def test_the_last_word_on_keys_and_values_counts(
    in_file: dict[str, Any], environ: dict[str, str], words: list[str], expected: tuple[bool, str], tmp_path: Path
) -> None:
    """A flag or variable for one of the two settings of keys and values wins over a file's word on the other."""
    path = tmp_path / "kv.yaml"
    path.write_text(yaml.safe_dump({"engine": in_file}))
    engine = load_settings(path, environ, flags_given(serve.make_context("serve", words).params)).config.engine
    assert (engine.kv_quantization, engine.kv_cache_dtype) == expected


def test_secrets_are_never_shown() -> None:
    """Keys stay out of repr, `--print-config` and error messages."""
    secret = "sk-very-secret-key"
    assert secret not in repr(AuthConfig(api_keys=(secret,)))
    assert secret not in CliRunner().invoke(serve, ["--print-config", "--api-key", secret]).output
    with pytest.raises(ConfigError) as caught:
        load_settings(None, {}, {"auth.api_keys": Given({"key": secret}, "flag")})
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        "auth: {api_key: sekrit}",
        "auth: {api_kyes: [sekrit]}",
        "auth: sekrit",
        "auht: {api_keys: [sekrit]}",
        "api_key: sekrit",
        "auth:\n  api_keys: 'sekrit' x",
    ],
)
def test_a_key_in_the_wrong_place_is_not_shown(document: str, tmp_path: Path) -> None:
    """Where a setting of keys is misspelled, the error names the setting but not the key: errors end in logs."""
    path = tmp_path / "settings.yaml"
    path.write_text(document)
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {}, {})
    assert "sekrit" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("num_kv_blocks", 1), ("block_size", 24), ("max_model_len", 0)])
def test_python_is_held_to_the_same_limits(name: str, value: Any) -> None:
    """A setting that a file may not have cannot be given from Python either."""
    given: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"EngineConfig: {name} = {value}: must be"):
        EngineConfig(**given)


def test_no_two_settings_share_a_spelling() -> None:
    """Each flag and each variable belongs to one setting."""
    flags = list(itertools.chain.from_iterable(field.metadata["flags"] for _, field in fields()))
    variables = [field.metadata["env"] for _, field in fields() if field.metadata["env"]]
    assert len(set(flags)) == len(flags)
    assert len(set(variables)) == len(variables)


@pytest.mark.parametrize("key", sorted(DECLARED))
@pytest.mark.parametrize("source", ["file", "flag"])
def test_any_value_of_any_setting_is_taken_or_refused_in_one_line(key: str, source: str) -> None:
    """Empty, negative, huge, not finite, of another type, with a NUL or a lone surrogate: never a traceback."""
    texts: list[Any] = ["", " ", "-1", "0", "abc", "1e400", "nan", "9" * 20, "9" * 400, "9" * 5000, "\0", "\ud800", "["]
    typed: list[Any] = [
        None,
        True,
        1.5,
        [],
        {},
        [1],
        ["a", None],
        10**400,
        16**4999,
        float("inf"),
        b"x",
        {"a": [1] * 999},
    ]
    refused: list[str] = []
    for value in [*texts, *(typed if source == "file" else ())]:
        try:
            load_settings(None, {}, {key: Given(value, source)})
        except ConfigError as error:
            refused.append(str(error))
    assert all(len(message) < 600 and key in message for message in refused)


@pytest.mark.parametrize(
    "key", [key for key, field in DECLARED.items() if field.type in (str, str | None, tuple[str, ...])]
)
def test_an_empty_text_is_refused(key: str) -> None:
    """A flag with an empty value is a variable of a script that was not set: never the default in silence."""
    with pytest.raises(ConfigError, match="must not be empty; leave it out to have the default"):
        load_settings(None, {}, {key: Given("", "flag")})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("server:\n  port: [\n", "end of file = '': is not YAML"),
        ("a: 'x", "line 1 = "),
        ("server: {", "line 1 = 'server: {': is not YAML"),
        ("[" * 5000, "is nested too deeply"),
        (
            "a: &a [x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '*a'] * 9)}]\n" for i in range(9)),
            "a = ",
        ),
        ("#" * 2**20 + "\n", "is larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_yaml_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    """Whatever a file holds, the error names the place; also at the end of the file, nested deeply, or of aliases."""
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {}, {})
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600
