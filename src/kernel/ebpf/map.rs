//! A map of the kernel's: read, written, and many entries with one call (bpf(2), "Map commands").

use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use bytemuck::{Pod, Zeroable};
use nix::errno::Errno;

use super::sys;

/// How many entries go with one call.
const AT_ONCE: usize = 4096;

/// How often the kernel is asked again where it had no memory for a single entry.
const ATTEMPTS: u32 = 500;
/// How long it is given before that.
const PAUSE: Duration = Duration::from_micros(200);

/// A map with keys and values of these types.
#[derive(Debug)]
pub struct Map<K, V> {
    fd: OwnedFd,
    types: PhantomData<(K, V)>,
}

/// `BPF_MAP_*_ELEM` (`union bpf_attr` in include/uapi/linux/bpf.h).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Element {
    map: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `BPF_MAP_*_BATCH`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

impl<K: Pod, V: Pod> Map<K, V> {
    /// Takes a map whose keys and values have the sizes of these types.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd, types: PhantomData }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn number(&self) -> u32 {
        sys::number(self.fd.as_fd())
    }

    /// A key with a value, or with room for one.
    fn element<T>(&self, key: *const K, value: *const T) -> Element {
        Element { map: self.number(), zero: 0, key: key as u64, value: value as u64, flags: 0 }
    }

    /// The value of a key.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        let mut element = self.element(key, &raw mut value);
        // SAFETY: key and value live until it returns, and have the sizes of the map.
        match unsafe { sys::call(sys::MAP_LOOKUP_ELEM, &mut element) } {
            Ok(_) => Ok(Some(value)),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives a key a value.
    ///
    /// # Errors
    /// What the kernel refuses; `E2BIG`: it is full.
    pub fn insert(&self, key: &K, value: &V) -> io::Result<()> {
        let mut element = self.element(key, value);
        // SAFETY: as above.
        unsafe { sys::call(sys::MAP_UPDATE_ELEM, &mut element) }?;
        Ok(())
    }

    /// Gives a key a value where it has none; tells whether it had none.
    ///
    /// # Errors
    /// What the kernel refuses; `E2BIG`: it is full.
    pub fn insert_new(&self, key: &K, value: &V) -> io::Result<bool> {
        /// `BPF_NOEXIST`.
        const NEW: u64 = 1;
        let mut element = Element { flags: NEW, ..self.element(key, value) };
        // SAFETY: as above.
        match unsafe { sys::call(sys::MAP_UPDATE_ELEM, &mut element) } {
            Ok(_) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes a key away; tells whether it was there.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn remove(&self, key: &K) -> io::Result<bool> {
        let mut element = self.element(key, std::ptr::null::<V>());
        // SAFETY: as above.
        match unsafe { sys::call(sys::MAP_DELETE_ELEM, &mut element) } {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives many keys their values.
    ///
    /// # Errors
    /// What the kernel refuses; those before have theirs then.
    pub fn insert_all(&self, entries: &[(K, V)]) -> io::Result<()> {
        for entries in entries.chunks(AT_ONCE) {
            let (keys, values): (Vec<K>, Vec<V>) = entries.iter().copied().unzip();
            // SAFETY: there is a value of the map's size for each key.
            unsafe { self.update_all(&keys, values.as_ptr().cast(), size_of::<V>()) }?;
        }
        Ok(())
    }

    /// Gives keys their values, which lie one after the other.
    ///
    /// # Safety
    /// There is a value for each key, and it has so many bytes, as many as the map's.
    unsafe fn update_all(&self, keys: &[K], values: *const u8, size: usize) -> io::Result<()> {
        let (mut done, mut attempts) = (0, 0);
        while let Some(rest @ [_, ..]) = keys.get(done..) {
            let values = values.wrapping_add(done * size) as u64;
            let mut batch = self.batch(rest.as_ptr() as u64, values, rest.len());
            // SAFETY: as the caller says; they live until it returns.
            match unsafe { sys::call(sys::MAP_UPDATE_BATCH, &mut batch) } {
                Ok(_) => return Ok(()),
                // Its store of free entries is filled up meanwhile, for each processor by a worker.
                Err(Errno::ENOMEM) if batch.count > 0 || attempts < ATTEMPTS => {
                    attempts = if batch.count > 0 { 0 } else { attempts + 1 };
                    done += batch.count as usize;
                    std::thread::sleep(PAUSE);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Takes keys away, whether they are there or not.
    ///
    /// # Errors
    /// What the kernel refuses; those before are gone then.
    pub fn remove_all(&self, keys: &[K]) -> io::Result<()> {
        let mut rest = keys;
        while !rest.is_empty() {
            let keys = rest.get(..AT_ONCE).unwrap_or(rest);
            let mut batch = self.batch(keys.as_ptr() as u64, 0, keys.len());
            // SAFETY: as above; values are not looked at.
            let done = match unsafe { sys::call(sys::MAP_DELETE_BATCH, &mut batch) } {
                Ok(_) => keys.len(),
                // It stopped at one that was not there.
                Err(Errno::ENOENT) => batch.count as usize + 1,
                Err(error) => return Err(error.into()),
            };
            rest = rest.get(done..).unwrap_or_default();
        }
        Ok(())
    }

    fn batch(&self, keys: u64, values: u64, count: usize) -> Batch {
        let (count, map) = (count as u32, self.number());
        Batch { from: 0, to: 0, keys, values, count, map, element_flags: 0, flags: 0 }
    }

    /// All entries. What is changed meanwhile may be there or not.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn entries(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut room = AT_ONCE;
        // Where the last call stopped: a key, or the number of a bucket.
        let (mut from, mut to) = ([0_u64; 32], [0_u64; 32]);
        let mut is_first = true;
        loop {
            let (mut keys, mut values) = (vec![K::zeroed(); room], vec![V::zeroed(); room]);
            let mut batch = self.batch(keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64, room);
            batch.from = if is_first { 0 } else { from.as_mut_ptr() as u64 };
            batch.to = to.as_mut_ptr() as u64;
            // SAFETY: there is room for as many keys and values as it says; `from` and `to` are larger
            // than a key of any map here.
            let called = unsafe { sys::call(sys::MAP_LOOKUP_BATCH, &mut batch) };
            let at_end = match called {
                Ok(_) => false,
                Err(Errno::ENOENT) => true,
                // A bucket has more entries than there is room for.
                Err(Errno::ENOSPC) => {
                    room *= 2;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let count = (batch.count as usize).min(room);
            entries.extend(keys.into_iter().zip(values).take(count));
            if at_end {
                return Ok(entries);
            }
            (from, is_first) = (to, false);
        }
    }
}

/// What has to change in a map: entries that are new or different, and keys that go.
pub fn difference<K: Ord + Copy, V: PartialEq + Copy>(
    now: &BTreeMap<K, V>,
    wanted: &BTreeMap<K, V>,
) -> (Vec<(K, V)>, Vec<K>) {
    let differs = |(key, value): &(&K, &V)| now.get(key) != Some(*value);
    let set = wanted.iter().filter(differs).map(|(key, value)| (*key, *value)).collect();
    (set, now.keys().filter(|key| !wanted.contains_key(key)).copied().collect())
}

/// Takes all entries out of a map whose keys have so many bytes.
pub(super) fn empty(map: BorrowedFd<'_>, size: usize) -> io::Result<()> {
    let number = sys::number(map);
    let mut key = vec![0_u8; size];
    loop {
        let mut first =
            Element { map: number, zero: 0, key: 0, value: key.as_mut_ptr() as u64, flags: 0 };
        // SAFETY: there is room for a key.
        match unsafe { sys::call(sys::MAP_GET_NEXT_KEY, &mut first) } {
            Err(Errno::ENOENT) => return Ok(()),
            found => found?,
        };
        let mut gone = Element { key: key.as_ptr() as u64, value: 0, ..first };
        // SAFETY: the key lives until it returns.
        match unsafe { sys::call(sys::MAP_DELETE_ELEM, &mut gone) } {
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A map whose values are one for each processor.
#[derive(Debug)]
pub struct CpuMap<K, V> {
    map: Map<K, V>,
    /// How many processors there may be.
    cpus: usize,
}

impl<K: Pod, V: Pod> CpuMap<K, V> {
    pub(super) fn new(map: Map<K, V>) -> io::Result<Self> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        Ok(Self { map, cpus })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.map.fd()
    }

    /// The values of a key; `None` where it is not there.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn get(&self, key: &K) -> io::Result<Option<Vec<V>>> {
        let mut values = vec![V::zeroed(); self.cpus];
        let mut element = self.map.element(key, values.as_mut_ptr());
        // SAFETY: there is a value for each processor, and their size is a multiple of 8.
        match unsafe { sys::call(sys::MAP_LOOKUP_ELEM, &mut element) } {
            Ok(_) => Ok(Some(values)),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// All keys. What is added or removed meanwhile may be among them or not.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn keys(&self) -> io::Result<Vec<K>> {
        let mut keys: Vec<K> = Vec::new();
        loop {
            let mut next = K::zeroed();
            let last = keys.last().map_or(std::ptr::null(), std::ptr::from_ref);
            let mut element = self.map.element(last, &raw mut next);
            // SAFETY: the key before, if any, and room for the next one live until it returns.
            match unsafe { sys::call(sys::MAP_GET_NEXT_KEY, &mut element) } {
                Ok(_) => keys.push(next),
                Err(Errno::ENOENT) => return Ok(keys),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes a key away; tells whether it was there.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn remove(&self, key: &K) -> io::Result<bool> {
        self.map.remove(key)
    }

    /// Takes keys away, whether they are there or not.
    ///
    /// # Errors
    /// What the kernel refuses; those before are gone then.
    pub fn remove_all(&self, keys: &[K]) -> io::Result<()> {
        self.map.remove_all(keys)
    }
}
