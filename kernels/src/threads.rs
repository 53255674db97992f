//! Work that several threads share.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

/// Does `work` for every item, on this thread and on others, `n_threads` in all. Threads take the
/// items in order, each the next one when it is done with the last.
///
/// Where the system starts no more threads (`ulimit -u`, a container's limit), those that run do it all.
///
/// # Errors
/// The error of the first item, in order, that has one. Later items may not have been begun.
///
/// # Panics
/// If `work` does.
pub fn parallel_for_each<I, E>(
    n_threads: usize,
    items: I,
    work: impl Fn(I::Item) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    I: Iterator + Send,
    E: Send,
{
    let items = Mutex::new(items.enumerate());
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let take_turns = || {
        while let Some((i, item)) = next() {
            work(item).map_err(|error| (i, error))?;
        }
        Ok(())
    };
    let results: Vec<_> = thread::scope(|scope| {
        let start = |_| Builder::new().spawn_scoped(scope, take_turns).ok();
        let others: Vec<_> = (1..n_threads).map_while(start).collect();
        let own = take_turns();
        let join = |other: thread::ScopedJoinHandle<'_, _>| {
            other.join().unwrap_or_else(|panic| resume_unwind(panic))
        };
        std::iter::once(own).chain(others.into_iter().map(join)).collect()
    });
    let first = results.into_iter().filter_map(Result::err).min_by_key(|(i, _)| *i);
    first.map_or(Ok(()), |(_, error)| Err(error))
}

/// How many of `n` more threads the system lets run at once: starts them, and ends them again.
pub(crate) fn startable(n: usize) -> usize {
    let gate = Mutex::new(());
    thread::scope(|scope| {
        let _closed = gate.lock();
        let wait = || drop(gate.lock());
        (0..n).map_while(|_| Builder::new().spawn_scoped(scope, wait).ok()).count()
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::process::Command;

    use super::*;

    /// Squares numbers on up to four threads; returns those that took part.
    fn square() -> HashSet<thread::ThreadId> {
        let mut numbers: Vec<usize> = (0..1000).collect();
        let seen = Mutex::new(HashSet::new());
        let result = parallel_for_each(4, numbers.iter_mut(), |number| {
            *number *= *number;
            seen.lock().unwrap().insert(thread::current().id());
            Ok::<_, ()>(())
        });
        assert_eq!(result, Ok(()));
        assert!(numbers.iter().enumerate().all(|(i, number)| *number == i * i));
        seen.into_inner().unwrap()
    }

    #[test]
    fn the_first_items_error_is_returned_whichever_thread_met_it() {
        for n_threads in [1, 2, 8] {
            let result =
                parallel_for_each(
                    n_threads,
                    0..1000,
                    |i| {
                        if i % 100 == 57 { Err(i) } else { Ok(()) }
                    },
                );
            assert_eq!(result, Err(57));
        }
    }

    /// A stack as large as the address space makes every start of a thread fail.
    #[test]
    #[cfg(target_os = "linux")]
    fn one_thread_does_it_all_where_no_other_can_be_started() {
        const CHILD: &str = "OPENVLA_TEST_THREADS";
        if std::env::var_os(CHILD).is_some() {
            assert_eq!((startable(3), square().len()), (0, 1));
            return;
        }
        assert!(startable(3) == 3 && square().len() <= 4);
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.arg("one_thread_does_it_all").env(CHILD, "1");
        let output = child.env("RUST_MIN_STACK", (1_u64 << 47).to_string()).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
    }
}
