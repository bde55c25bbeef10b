"""Every source of samples: scenes, images, captions, conversations, code shards."""
