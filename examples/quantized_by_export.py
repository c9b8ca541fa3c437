"""Train, freeze statistics, fold, and quantize to 8 bits by pt2e; print accuracies.

Needs torchao. Batch normalization is folded before the export, so that the quantizer gets
convolutions with a bias and needs no pattern for normalizations.
"""

import digits
import torch

import batchnorm as bn


def quantized(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model of 8-bit weights and activations, with ranges from the training images."""
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config()
    )
    images = digits.batches()
    shapes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(model.eval(), (images[0],), dynamic_shapes=shapes).module()
    prepared = quantize_pt2e.prepare_pt2e(exported, quantizer)
    for batch in images:
        prepared(batch)
    converted: torch.nn.Module = quantize_pt2e.convert_pt2e(prepared)
    pt2e.move_exported_model_to_eval(converted)
    converted.eval = lambda: converted  # type: ignore[method-assign, assignment]
    return converted


def main(steps: int = 300) -> dict[str, float]:
    """Return test accuracies: trained, with frozen statistics, folded, and in 8 bits."""
    model = digits.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    digits.train(model, optimizer, steps, 32)
    found = {"float32, trained": digits.accuracy(model)}
    bn.calibrate(model, digits.batches())
    bn.freeze(model, affine=False)
    digits.train(model, optimizer, steps // 3, 32)
    found["float32, trained on with frozen statistics"] = digits.accuracy(model)
    bn.fold(model.eval(), digits.batches()[0])
    found["float32, folded"] = digits.accuracy(model)
    found["8 bits"] = digits.accuracy(quantized(model))
    for name, accuracy in found.items():
        print(f"{name:<44} {accuracy:.3f}")
    return found


if __name__ == "__main__":
    main()
