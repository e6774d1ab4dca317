"""The lab: models, texts, tasks and metrics without downloads, where claims are proven."""
