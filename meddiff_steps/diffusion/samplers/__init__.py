"""Samplers: a file each, which says at its top what it is (`ENTRY`) and holds a solver short enough to check by eye.

Beside its ENTRY (`core.registries`; with `"of_students": True` it draws from students alone, see `few_step`) a file has

`timesteps`
    timesteps(process, steps) -> the levels of a full run, falling; of `diffusion.levels`, for example;
`solver`
    solver(levels, step_noise) -> step(i, x, estimate), the state at level i + 1 from the state x at level i. What a
    multistep method remembers lives in `step`; a solver is made for every run. It knows levels and nothing of
    processes, prediction types, conditions and guidance: `estimate(x, level)` is where these are.
"""
