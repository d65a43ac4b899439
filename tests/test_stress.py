import stress


def test_random_work_in_threads_is_as_alone():
    wrong, done = stress.run(seconds=5)
    assert not wrong
    assert set(done) == {"ask", "train", "go_on", "stop", "copy"}
