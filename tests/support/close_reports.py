"""Reports of the same embeddings that were computed in other batches."""

from apecache.metrics.retrieval import RetrievalReport


def assert_close_reports(report: RetrievalReport, measured: RetrievalReport) -> None:
    """Check that two reports agree up to the rounding of another batch size.

    Kernels are chosen by the shape of a batch, so two candidates that score almost alike may change
    places on one processor and not on the next. One query of a few dozen may change; another model
    would change many.
    """
    assert (report.n_images, report.n_texts) == (measured.n_images, measured.n_texts)
    assert report.chance_image_to_text == measured.chance_image_to_text
    assert report.chance_text_to_image == measured.chance_text_to_image
    for way, n_queries in (("image_to_text", report.n_images), ("text_to_image", report.n_texts)):
        for k, recall in getattr(report, way).items():
            assert abs(recall - getattr(measured, way)[k]) <= 100 / n_queries + 1e-9, (way, k)
