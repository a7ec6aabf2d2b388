"""A campaign of faults: trainings on two ranks are killed, stopped, slowed down or given NaNs at random moments, and must end as if nothing
had happened.

    python -m tests.chaos
    python -m tests.chaos --only hang --num-runs 6 --seed 3

A *run* is one training with one fault (faults.py). Its ranks are started, watched and started again as torchrun or Slurm would do it
(jobs.py, supervisor.py), and its results are compared with those of the undisturbed run of the same layout (verdict.py). Faults come from
outside: signals, files, a full disk. The launcher installs faults inside a rank before training begins (hooks.py).
"""
