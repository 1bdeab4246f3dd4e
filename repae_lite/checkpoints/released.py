"""The sets that the REPA-E organisation has released on the Hugging Face Hub.

Not all of their files' names are known beforehand; `repae download` lists them and picks by pattern.
"""

RELEASED = {  # set -> its kind
    "sdvae": "vae", "invae": "vae", "vavae": "vae",
    "e2e-sdvae": "vae", "e2e-invae": "vae", "e2e-vavae": "vae",
    "e2e-sdvae-hf": "diffusers", "e2e-invae-hf": "diffusers", "e2e-vavae-hf": "diffusers",
    "sit-repae-sdvae": "run", "sit-repae-invae": "run", "sit-repae-vavae": "run",
    "sit-ldm-e2e-vavae": "run",
}  # fmt: skip
ORGANISATION = "REPA-E"
