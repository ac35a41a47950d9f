"""The ``retrainscope`` command at work: ``recommend`` advises on what ``model_names`` and ``data_paths`` bring."""
