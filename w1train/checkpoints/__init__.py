"""Checkpoints. The modules are listed in the order in which they make and use a checkpoint.

    model_state.py            what a checkpoint holds of model and optimizer
    format/shard_plan.py      plan: which rank writes which tensors
    saver.py, staging.py      write: at a step boundary, in the background
    format/shard_files.py     hash: the files of the ranks, hashed while they are written, and the index of all
    commit.py                 commit: the manifest and one rename, after which the checkpoint exists
    manifest.py               what a complete checkpoint is
    verification.py           verify: files against the manifest's hashes
    recovery.py               recover: the checkpoint that a start resumes from
    loading.py                load: into any layout
    retention.py              keep: the newest, the best, and some for ever
    averaging.py              average: one checkpoint from several
    remote/                   copies in object storage

A save writes into ``checkpoints/.writing-step_X`` (checkpoint_names.py). A process that is killed at any moment leaves either a complete
checkpoint or such a directory, which the next start removes.
"""
