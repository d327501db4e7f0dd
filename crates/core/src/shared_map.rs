//! A map whose copies share what they have in common.
//!
//! It is cut into shards by the keys' hashes. A copy is one reference more. What is changed in a copy
//! is copied first: the list of the shards once, and each shard that something is changed in. With
//! 100,000 entries that is some microseconds; an entry that is not changed has no cost beyond a hash
//! table's.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

/// About the square root of the most entries that are expected: a change copies so many references,
/// and so many entries.
const SHARDS: usize = 256;

/// A hash map that is cheap to copy.
#[derive(Clone, Debug)]
pub(crate) struct SharedMap<K, V> {
    shards: Arc<[Arc<HashMap<K, V>>; SHARDS]>,
    /// Says which shard a key is in. Not theirs: what is in one would be in few of its buckets.
    hasher: RandomState,
    len: usize,
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> SharedMap<K, V> {
        let empty = Arc::new(HashMap::new());
        let shards = Arc::new(std::array::from_fn(|_| Arc::clone(&empty)));
        SharedMap { shards, hasher: RandomState::new(), len: 0 }
    }
}

impl<K: Clone + Eq + Hash, V: Clone> SharedMap<K, V> {
    fn shard<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        self.hasher.hash_one(key) as usize % SHARDS
    }

    pub(crate) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards[self.shard(key)].get(key)
    }

    pub(crate) fn contains_key<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let shard = self.shard(&key);
        let before = Arc::make_mut(&mut Arc::make_mut(&mut self.shards)[shard]).insert(key, value);
        self.len += usize::from(before.is_none());
        before
    }

    pub(crate) fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let shard = self.shard(key);
        if !self.shards[shard].contains_key(key) {
            return None;
        }
        let removed = Arc::make_mut(&mut Arc::make_mut(&mut self.shards)[shard]).remove(key);
        self.len -= usize::from(removed.is_some());
        removed
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    /// All values, in no order.
    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What one copy is changed to, no other is.
        #[test]
        fn copies_are_maps_of_their_own(steps in vec((0..4_usize, 0..600_u16, any::<Option<u8>>()), 0..300)) {
            let mut copies: Vec<(SharedMap<u16, u8>, BTreeMap<u16, u8>)> = vec![Default::default()];
            for (which, key, value) in steps {
                let which = which % copies.len();
                let (mut map, mut model) = copies[which].clone();
                let (was, should) = match value {
                    Some(value) => (map.insert(key, value), model.insert(key, value)),
                    None => (map.remove(&key), model.remove(&key)),
                };
                prop_assert_eq!(was, should);
                if copies.len() < 4 { copies.push((map, model)) } else { copies[which] = (map, model) }
            }
            for (map, model) in &copies {
                let all: BTreeMap<u16, u8> = map.iter().map(|(key, value)| (*key, *value)).collect();
                prop_assert_eq!(&all, model);
                prop_assert_eq!((map.len(), map.is_empty()), (model.len(), model.is_empty()));
                prop_assert!(model.iter().all(|(key, value)| map.get(key) == Some(value)));
            }
        }
    }
}
