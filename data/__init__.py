"""Every source of samples: the embedded scenes, image folders, caption pairs, LLaVA conversations, code shards."""
