# `just` runs what must hold before a commit; `just --list` shows the rest.

default: lint test

# The tests, all of them.
test *arguments:
    pytest {{ arguments }}

# Style, types and floors.
lint:
    ruff check .
    ruff format --check .
    lint-imports
    pyright

# Write the style down.
format:
    ruff check --fix .
    ruff format .

# The documentation on port 8001; needs the docs extra.
docs:
    mkdocs serve --strict --dev-addr localhost:8001

# Everything that CI does, in a fresh virtual environment.
ci:
    .ci/run

# The demo model on port 8000.
serve *flags:
    trio-llm serve {{ flags }}

# Start-up time, throughput and latency of the demo model.
bench:
    trio-llm bench startup
    trio-llm bench serve
