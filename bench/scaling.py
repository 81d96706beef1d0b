"""How the time of a PPO iteration grows with batch, response length and model size.

    python bench/scaling.py --shape cpu -- --dtype bf16
    python bench/scaling.py --shape S --factors 0.5 1 2

Each axis is scaled alone, by the factors, from the shape given: prompts per iteration; tokens per
prompt and response; or the model, in width, heads and intermediate width together. The slope is
that of log(seconds) against log(size), by least squares: 1 is linear growth; attention's share,
quadratic in the length, lifts it, and what each iteration or step costs at any size lowers it.
"""

import dataclasses
import math
import pathlib
import sys
import tempfile

import iteration


def scaled(shape, axis, factor):
    """The shape with one axis times a factor."""
    times = lambda number: round(number * factor)
    if axis == "batch":
        size = times(shape.batch_size)
        return dataclasses.replace(shape, batch_size=size, minibatch_size=size)
    if axis == "length":
        return dataclasses.replace(
            shape, prompt_length=times(shape.prompt_length),
            response_length=times(shape.response_length),
        )
    return dataclasses.replace(
        shape, hidden=times(shape.hidden), intermediate=times(shape.intermediate),
        heads=times(shape.heads), kv_heads=times(shape.kv_heads),
    )


def size_of(shape, axis):
    """What the time is drawn against: prompts, tokens, or the parameters of all matrices."""
    if axis == "batch":
        return shape.batch_size
    if axis == "length":
        return shape.prompt_length + shape.response_length
    return iteration.matrix_flops(shape)[1] + shape.hidden * shape.vocabulary


def slope(sizes, seconds):
    """Of log(seconds) against log(size), by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return products / sum((a - mean_x) ** 2 for a in x)


def main(argv):
    parser = iteration.parser(__doc__.splitlines()[0])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1, 2])
    args, shape, flags = iteration.parse(parser, argv)
    if len(set(args.factors)) < 2:
        parser.error("--factors needs two different ones for a slope")
    axes = {}
    for axis in ("batch", "length", "parameters"):
        points = []
        for factor in args.factors:
            now = scaled(shape, axis, factor)
            with tempfile.TemporaryDirectory() as name:
                folder = pathlib.Path(name)
                iteration.write_inputs(now, folder)
                rows = iteration.run_ppo(now, folder, args.warm_up + args.repeats, flags)
            seconds = iteration.seconds_of(rows[args.warm_up :])
            points.append({"size": size_of(now, axis), "seconds": seconds})
            shown = "".join(f"{name} {low:.2f} s  " for name, (low, *_) in seconds.items())
            print(f"{axis:<16}{points[-1]['size']:>10}   {shown}", flush=True)
        sizes = [point["size"] for point in points]
        slopes = {
            phase: slope(sizes, [point["seconds"][phase][0] for point in points])
            for phase in (*iteration.PHASES, "total")
        }
        axes[axis] = {"points": points, "slopes": slopes}
        shown = "".join(f"{name} {value:.2f}    " for name, value in slopes.items())
        print(f"{axis:<16}{'slope':>10}   {shown}", flush=True)
    result = {"shape": vars(shape), "flags": flags, "axes": axes}
    iteration.save(result | iteration.machine(iteration.device_of(flags)), args.output, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
