"""Measuring quantized models, before and after.

| module | what |
|---|---|
| perplexity | `perplexity(model, token_ids)`, `token_windows(text, tokenizer)` |
| vqa | `answer_accuracy(model, processor, rows)`: exact match and answer likelihood |
| agreement | `agreement(model, original, batches)`: KL and same top token |
| size | `model_size(model)`: true bits; `disk_bytes(folder)` |
| evaluation, summary, report | all of it as tables, for a terminal, in markdown, as JSON |
| demo, picture, token_map | the job of `vlmq demo` |
"""
