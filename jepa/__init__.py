"""I-JEPA (Assran et al., CVPR 2023, arXiv 2301.08243): masks, encoder, predictor, objective, probes."""
