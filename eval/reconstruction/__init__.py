"""Images before and after the tokenizer: PSNR, SSIM, LPIPS, rFID."""
