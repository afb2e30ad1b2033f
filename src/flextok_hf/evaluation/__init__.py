"""Reproducible measurements of tokenizers and priors; they need the extra `flextok_hf[eval]`.

In order of data flow:

    images             dataset rows -> images (B, 3, R, R) uint8; unreadable ones are counted
    sampling           prompts or images -> images from 1, 2, 4, ... tokens, with one generator per sample
    feature_networks   images -> features and class probabilities of a public or custom network
    image_index        images -> their nearest real images by color and shape
    image_measures     images and originals -> PSNR, SSIM, MAE, ... per image
    accumulators       batches of values -> running sums; memory does not grow with the number of images
    progress           batches split over processes, saved and resumed
    reconstruction, generation, complexity   the three measurements, from options to a record
    adherence          used by all three: does an image show what was asked for
    results            records with their protocol -> JSON and Markdown; comparison of two records
    plots              records -> curves over the number of tokens

`scripts/evaluate.py` is the command. Imports `data`, `pipelines`, `models` and `utils`, never `training`.
"""
