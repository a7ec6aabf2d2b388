"""A campaign of faults: training on two ranks is killed, stopped, starved and fed with NaNs at random moments, and must end as if
nothing had happened.

    python -m tests.chaos
    python -m tests.chaos --only hang --num-runs 6 --seed 3

A *run* is one training with one fault (faults.py). Its ranks are started, watched and started again as torchrun or Slurm would do it
(jobs.py, supervisor.py), and what it leaves is compared with the undisturbed run of the same layout (verdict.py). Faults come from outside:
signals, files, a full disk. What must happen inside a rank is put there by its launcher before training begins (hooks.py).
"""
