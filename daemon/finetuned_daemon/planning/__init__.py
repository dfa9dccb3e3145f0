"""What a run will do and take, said beforehand: steps, checkpoints, disk, parameters, memory.

    model_files.py   what the files of a model's folder say of it, without loading it
    schedule.py      optimizer steps, evaluations, checkpoints
    adapter.py       the tensors that LoRA adds, trains and saves
    setup.py         which weights are trained on a device, in which formats
    disk.py          bytes that a run leaves
    memory.py        peak memory of the runner
    timing.py        how long it takes
    calibration.py   what a probe corrects
    plan.py          all of it

Nothing here imports torch; formulas follow what transformers, peft and torch were measured to do.
"""
