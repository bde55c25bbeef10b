"""Complete hub folders of trained models: files, model card, what was measured, examples."""
