"""Measurements of tokenizers and priors that can be repeated; they need the extra `flextok_hf[eval]`.

In the order of the data:

    images             rows of a data set -> images (B, 3, R, R) of 8 bits, the unreadable ones counted
    sampling           prompts or images -> images from 1, 2, 4, ... tokens, one generator each
    feature_networks   images -> features and class probabilities of a public or of our own network
    image_index        images -> their nearest real images by color and shape
    image_measures     images and originals -> PSNR, SSIM, MAE, ... of each
    accumulators       a batch of values -> sums; memory does not grow with the number of images
    progress           batches over processes, saved and resumed
    reconstruction, generation, complexity   the three measurements, from options to a record
    adherence          what they share: does the image show what was asked for
    results            records with their protocol -> JSON and Markdown; two of them compared
    plots              records -> curves over the number of tokens

`scripts/evaluate.py` is the command. Imports `data`, `pipelines`, `models` and `utils`, never `training`.
"""
