//! A map that forgets entries that were not used for a while, and has a limited size.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// The most entries: far more clients than one model can serve.
const MOST: usize = 4096;

/// Values that are forgotten a while after their last use. The clock is an argument.
#[derive(Debug)]
pub struct Recent<K, V> {
    entries: HashMap<K, (Instant, V)>,
    memory: Duration,
    swept: Option<Instant>,
}

impl<K: Hash + Eq + Clone, V: Default> Recent<K, V> {
    /// An empty map that remembers for so long.
    pub fn new(memory: Duration) -> Self {
        Self { entries: HashMap::new(), memory, swept: None }
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All values. Does not count as use.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.entries.values_mut().map(|(_, value)| value)
    }

    /// The value of a key. Does not count as use.
    pub fn get(&self, key: &K, now: Instant) -> Option<&V> {
        let (used, value) = self.entries.get(key)?;
        (now.saturating_duration_since(*used) <= self.memory).then_some(value)
    }

    /// The value of a key, or a new one. Counts as use.
    pub fn entry(&mut self, key: K, now: Instant) -> &mut V {
        if self.get(&key, now).is_none() {
            self.make_room(now);
            self.entries.insert(key.clone(), (now, V::default()));
        }
        let (used, value) = self.entries.entry(key).or_insert_with(|| (now, V::default()));
        *used = now;
        value
    }

    fn make_room(&mut self, now: Instant) {
        let full = self.entries.len() >= MOST;
        if full || self.swept.is_none_or(|at| now.saturating_duration_since(at) > self.memory) {
            let memory = self.memory;
            self.entries.retain(|_, (used, _)| now.saturating_duration_since(*used) <= memory);
            self.swept = Some(now);
        }
        if self.entries.len() >= MOST {
            let oldest = self.entries.iter().min_by_key(|(_, (used, _))| *used);
            if let Some(key) = oldest.map(|(key, _)| key.clone()) {
                self.entries.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn use_keeps_and_silence_forgets() {
        let (mut map, now) = (Recent::<u32, u32>::new(10 * SECOND), Instant::now());
        *map.entry(1, now) = 7;
        *map.entry(1, now + 10 * SECOND) += 1;
        assert_eq!(map.get(&1, now + 20 * SECOND), Some(&8));
        assert_eq!(map.get(&1, now + 21 * SECOND), None);
        assert_eq!(*map.entry(1, now + 21 * SECOND), 0, "begins anew");
    }

    #[test]
    fn it_holds_so_many_and_the_longest_silent_goes_first() {
        let (mut map, now) = (Recent::<usize, ()>::new(10_000 * SECOND), Instant::now());
        for i in 0..=MOST {
            map.entry(i, now + i as u32 * SECOND / 1000);
        }
        let last = now + MOST as u32 * SECOND / 1000;
        assert_eq!(map.len(), MOST);
        assert!(map.get(&0, last).is_none() && map.get(&1, last).is_some());
        map.entry(9999, last + 20_000 * SECOND);
        assert_eq!(map.len(), 1, "swept");
    }
}
