"""From files to tokens: records, messages, chat templates, rows, shards, prompts, answers."""
