"""From a request to tokens and back: prompts, chat templates, sampling parameters, answers whole or streamed."""
