"""What the workbench measures, as pure functions of tensors; import the module that holds the measure.

- `routing`: load of the experts and its null, balance-loss value, drops, confidence, routing information, churn
- `information`: mutual information of a count table with its expected value under independence
- `coactivation`: which experts of one layer are chosen together; `curveball`: the same against fixed margins
- `transition`: from the experts of one layer to those of the next
- `pools`: how the layers share one pool of experts; `redundancy`: how much the experts of a layer say the same
- `conflict`: gradients of several tasks against each other, from Gramians of two half batches
- `spectra`: singular values and the measures of a spectrum; `operators`: norms and alignments of matrices
- `random_matrix`: what an i.i.d. matrix of the same shape gives; `power_law`: the tail exponent
- `images`: PSNR and SSIM of images against the true ones
- `meters`: counts collected over many batches, mergeable by addition
- `statistics`: intervals, equivalence tests, effect sizes and corrections for comparisons over seeds

Conventions. Measures take tensors with any leading dimensions (steps, layers) and compute in float64. What is undefined
(no tokens, a zero gradient, one expert per token) is NaN, never 0; where a reason helps, the result carries it as
`undefined_reason`. Every measure that has a null value, the one chance alone would give, offers it beside.
"""
