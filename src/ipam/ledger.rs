//! The addresses of one network: which are taken, whose blocks they belong to, and which one an
//! endpoint of a node gets.
//!
//! A subnet is cut into blocks of one size. A node takes a block and gives its endpoints addresses
//! from it; the others need one route for all of them, and nobody else chooses from it, so nodes
//! do not get into each other's way. Who runs out takes another block. When there is none left it
//! takes an empty one of another node, and at last single addresses from others' blocks.
//!
//! A block says where to look first, and never who has an address: that is the address's own key
//! in the store. So a block may change hands at any time, and no address is given out twice.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Range;

use ipnetwork::IpNetwork;

use super::count::{Count, NodeCount, SubnetCount};
use super::space::Space;
use crate::model::snapshot::Holder;
use crate::model::subnet::{address_at, width};
use crate::model::{Name, Network, NodeName, Reservation, Subnet};

/// What is known of a network's addresses.
#[derive(Debug, Clone)]
pub struct Ledger {
    me: NodeName,
    spans: Vec<Span>,
    holders: BTreeMap<IpAddr, Holder>,
    blocks: Blocks,
    reservations: BTreeMap<Name, Reservation>,
    /// The revision that changed a reservation last.
    guard: Option<u64>,
    /// The store's revision up to which this is complete.
    revision: u64,
}

/// The blocks of a network by their range: whose each is.
pub type Blocks = BTreeMap<IpNetwork, Block>;

/// Whose a block is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The node.
    pub node: NodeName,
    /// The store's revision that wrote this.
    pub revision: u64,
}

/// A block of this node in which an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnBlock {
    /// Its addresses.
    pub range: IpNetwork,
    /// The store's revision that made it this node's.
    pub revision: u64,
    /// Whether nothing else is held in it.
    pub is_empty_else: bool,
}

/// An address that an endpoint may get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// The address.
    pub address: IpAddr,
    /// The block that this node must take for it.
    pub block: Option<NewBlock>,
}

/// A block for this node to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBlock {
    /// Its range.
    pub range: IpNetwork,
    /// The revision at which another node, which has nothing in it, took it.
    pub from: Option<u64>,
}

/// How many addresses of a subnet may be given out without being asked for.
pub fn usable(subnet: &Subnet) -> u128 {
    Span::new(subnet).usable
}

/// The addresses of one subnet that may be given out without being asked for.
#[derive(Debug, Clone)]
struct Span {
    subnet: Subnet,
    /// The part from which addresses are given, counted from the subnet's first.
    given: Range<u128>,
    /// How many of them are usable at all.
    usable: u128,
    /// What is taken, and what nobody gets.
    taken: Space,
    /// Those that nobody gets.
    nobodys: BTreeSet<u128>,
    /// How many of the usable ones are held, by whom.
    held: Held,
    /// What was proposed of it and is not held yet: a few at a time.
    proposed: BTreeSet<u128>,
    /// The number of addresses of a block.
    block: u128,
    /// This node's blocks by their first address.
    mine: BTreeSet<u128>,
    /// Those of them that were not found to be full since something in them was freed.
    open: BTreeSet<u128>,
    /// Behind the address that was given out last.
    cursor: u128,
}

/// How many addresses endpoints have, and services, and how many rest.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    endpoints: u128,
    services: u128,
    resting: u128,
}

impl Held {
    fn of(&mut self, holder: Holder) -> &mut u128 {
        match holder {
            Holder::Endpoint(_) => &mut self.endpoints,
            Holder::Service(_) => &mut self.services,
            Holder::Resting => &mut self.resting,
        }
    }
}

impl Ledger {
    /// The addresses of a network as one node sees it; nothing is known of it yet.
    pub fn new(me: NodeName) -> Self {
        Self {
            me,
            spans: Vec::new(),
            holders: BTreeMap::new(),
            blocks: BTreeMap::new(),
            reservations: BTreeMap::new(),
            guard: None,
            revision: 0,
        }
    }

    /// Takes over the network's subnets where they have changed.
    pub fn follow(&mut self, network: &Network) {
        if !network.subnets.iter().eq(self.spans.iter().map(|span| &span.subnet)) {
            self.spans = network.subnets.iter().map(Span::new).collect();
            let (holders, blocks) =
                (std::mem::take(&mut self.holders), std::mem::take(&mut self.blocks));
            self.reset(holders, blocks);
        }
    }

    /// Takes over all that is held and owned, in place of what was known before.
    pub fn reset(
        &mut self,
        holders: impl IntoIterator<Item = (IpAddr, Holder)>,
        blocks: impl IntoIterator<Item = (IpNetwork, Block)>,
    ) {
        self.holders.clear();
        self.blocks.clear();
        for span in &mut self.spans {
            *span = Span { cursor: span.cursor, ..Span::new(&span.subnet) };
        }
        holders.into_iter().for_each(|(address, holder)| self.hold(address, holder));
        blocks.into_iter().for_each(|(range, block)| self.own(range, block));
    }

    /// Somebody holds an address.
    pub fn hold(&mut self, address: IpAddr, holder: Holder) {
        let before = self.holders.insert(address, holder);
        if let Some((span, number)) = self.place(address) {
            span.proposed.remove(&number);
            span.take(number);
            span.tally(number, before, Some(holder));
        }
    }

    /// Nobody holds an address any more.
    pub fn release(&mut self, address: IpAddr) {
        let before = self.holders.remove(&address);
        if let Some((span, number)) = self.place(address) {
            span.proposed.remove(&number);
            span.free(number);
            span.tally(number, before, None);
        }
    }

    /// Who holds an address.
    pub fn holder(&self, address: IpAddr) -> Option<Holder> {
        self.holders.get(&address).copied()
    }

    /// Who holds what.
    pub fn holders(&self) -> &BTreeMap<IpAddr, Holder> {
        &self.holders
    }

    /// A node has a block.
    pub fn own(&mut self, range: IpNetwork, block: Block) {
        self.disown(range);
        if block.node == self.me
            && let Some((span, start)) = self.place(range.network())
            && start % span.block == 0
        {
            span.add_block(start);
        }
        self.blocks.insert(range, block);
    }

    /// Nobody has a block any more.
    pub fn disown(&mut self, range: IpNetwork) {
        self.blocks.remove(&range);
        if let Some((span, start)) = self.place(range.network()) {
            span.mine.remove(&start);
            span.open.remove(&start);
        }
    }

    /// Some addresses are kept.
    pub fn reserve(&mut self, name: Name, reservation: Reservation) {
        self.reservations.insert(name, reservation);
    }

    /// None are kept under this name any more.
    pub fn end_reservation(&mut self, name: &Name) {
        self.reservations.remove(name);
    }

    /// Nothing is kept, as far as it is known.
    pub fn forget_reservations(&mut self) {
        self.reservations.clear();
        self.guard = None;
    }

    /// What is kept.
    pub fn reservations(&self) -> &BTreeMap<Name, Reservation> {
        &self.reservations
    }

    /// How many addresses of each family are kept.
    pub fn reserved(&self) -> u128 {
        self.reservations.values().map(|reservation| u128::from(reservation.left())).sum()
    }

    /// The revision that changed a reservation last, as far as it is known.
    pub fn guard(&self) -> Option<u64> {
        self.guard
    }

    /// A reservation was changed at a revision; `None`: none ever was.
    pub fn set_guard(&mut self, revision: Option<u64>) {
        self.guard = revision;
    }

    /// The store's revision up to which this is complete; 0: nothing was read yet.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// All is known up to this revision.
    pub fn set_revision(&mut self, revision: u64) {
        self.revision = revision;
    }

    /// The blocks.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// This node's blocks.
    pub fn own_blocks(&self) -> impl Iterator<Item = (IpNetwork, u64)> {
        let own = self.blocks.iter().filter(|(_, block)| block.node == self.me);
        own.map(|(range, block)| (*range, block.revision))
    }

    /// The blocks of this node in which addresses are; those in others' are left out.
    pub fn own_blocks_of(&self, addresses: &[IpAddr]) -> BTreeMap<IpAddr, OwnBlock> {
        let block = |address: &IpAddr| {
            let (index, number) = self.find(*address)?;
            let (range, revision) = self.own_block_of(*address)?;
            let is_empty_else = self.spans.get(index)?.is_empty_block_but(number);
            Some((*address, OwnBlock { range, revision, is_empty_else }))
        };
        addresses.iter().filter_map(block).collect()
    }

    fn own_block_of(&self, address: IpAddr) -> Option<(IpNetwork, u64)> {
        let (index, _) = self.find(address)?;
        let range = self.spans.get(index)?.subnet.block_of(address)?;
        let block = self.blocks.get(&range).filter(|block| block.node == self.me)?;
        Some((range, block.revision))
    }

    /// Chooses a free address of one family, and holds it as given out; `None` when every address
    /// is taken that may be given out: usable ones, within the ranges of the subnets that have one.
    ///
    /// `alive` tells which nodes are; `spread` is any number: nodes that look for blocks at the same
    /// time find different ones when theirs differ.
    pub fn propose(
        &mut self,
        ipv4: bool,
        alive: impl Fn(&NodeName) -> bool,
        spread: u128,
    ) -> Option<Proposal> {
        let family = |span: &&mut Span| span.subnet.cidr().is_ipv4() == ipv4;
        if let Some(address) = self.spans.iter_mut().filter(family).find_map(Span::own_free) {
            return Some(Proposal { address, block: None });
        }
        self.new_block(ipv4, spread)
            .or_else(|| self.empty_block(ipv4, alive))
            .or_else(|| self.borrow(ipv4, spread))
    }

    /// Gives an address back that was proposed and not used.
    pub fn withdraw(&mut self, address: IpAddr) {
        if let Some((span, number)) = self.place(address)
            && span.proposed.remove(&number)
        {
            span.free(number);
        }
    }

    fn new_block(&mut self, ipv4: bool, spread: u128) -> Option<Proposal> {
        for span in self.spans.iter_mut().filter(|span| span.subnet.cidr().is_ipv4() == ipv4) {
            let (first, last) = (span.given.start / span.block, (span.given.end - 1) / span.block);
            let start = first + spread % (last - first + 1);
            let found = (start..=last).chain(first..start).find_map(|index| {
                let range = span.range(index * span.block);
                let number = span.taken.next_free(span.within(index * span.block))?;
                (!self.blocks.contains_key(&range)).then_some((range, number))
            });
            if let Some((range, number)) = found {
                let block = Some(NewBlock { range, from: None });
                return Some(Proposal { address: span.give(number), block });
            }
        }
        None
    }

    /// A block of another node that has nothing in it: of one that is not alive first, then of one
    /// that has more than one.
    fn empty_block(&mut self, ipv4: bool, alive: impl Fn(&NodeName) -> bool) -> Option<Proposal> {
        let mut counts: BTreeMap<&NodeName, usize> = BTreeMap::new();
        let others =
            self.blocks.iter().filter(|(range, block)| range.is_ipv4() == ipv4 && block.node != self.me);
        for (_, block) in others.clone() {
            *counts.entry(&block.node).or_default() += 1;
        }
        let mut best = None;
        for (range, block) in others {
            let dead = !alive(&block.node);
            if !dead && (best.is_some() || counts.get(&block.node).is_none_or(|count| *count < 2)) {
                continue;
            }
            let Some((index, start)) = self.find(range.network()) else { continue };
            if self.spans[index].is_empty_block(start) {
                best = Some((index, start, *range, block.revision));
                if dead {
                    break;
                }
            }
        }
        let (index, start, range, revision) = best?;
        let span = self.spans.get_mut(index)?;
        let number = span.taken.next_free(span.within(start))?;
        let block = Some(NewBlock { range, from: Some(revision) });
        Some(Proposal { address: span.give(number), block })
    }

    fn borrow(&mut self, ipv4: bool, spread: u128) -> Option<Proposal> {
        self.spans.iter_mut().filter(|span| span.subnet.cidr().is_ipv4() == ipv4).find_map(|span| {
            let start = span.given.start + spread % (span.given.end - span.given.start);
            let behind = span.taken.next_free(start..span.given.end);
            let number = behind.or_else(|| span.taken.next_free(span.given.start..start))?;
            Some(Proposal { address: span.give(number), block: None })
        })
    }

    /// Counts the addresses of one family. What it takes grows with the subnets only.
    pub fn count(&self, ipv4: bool) -> Count {
        let mut sum = Count { reserved: self.reserved(), ..Count::default() };
        for span in self.spans.iter().filter(|span| span.subnet.cidr().is_ipv4() == ipv4) {
            let Count { usable, endpoints, services, resting, .. } = span.count();
            sum.usable = sum.usable.saturating_add(usable);
            sum.endpoints += endpoints;
            sum.services += services;
            sum.resting += resting;
        }
        sum
    }

    /// Counts the addresses of each subnet, in the network's order.
    pub fn by_subnet(&self) -> impl Iterator<Item = SubnetCount> {
        self.spans.iter().map(|span| SubnetCount {
            cidr: span.subnet.cidr(),
            count: span.count(),
            excluded: span.subnet.reserved().len() as u128,
        })
    }

    /// Counts what each node has in its blocks of one family. What it takes grows with the blocks.
    pub fn by_node(&self, ipv4: bool) -> BTreeMap<&NodeName, NodeCount> {
        let mut counts: BTreeMap<&NodeName, NodeCount> = BTreeMap::new();
        for (range, block) in self.blocks.iter().filter(|(range, _)| range.is_ipv4() == ipv4) {
            let count = counts.entry(&block.node).or_default();
            count.blocks += 1;
            if let Some((index, start)) = self.find(range.network()) {
                count.free += self.spans[index].free_in_block(start);
            }
        }
        counts
    }

    fn find(&self, address: IpAddr) -> Option<(usize, u128)> {
        self.spans.iter().enumerate().find_map(|(index, span)| Some((index, span.number(address)?)))
    }

    fn place(&mut self, address: IpAddr) -> Option<(&mut Span, u128)> {
        let (index, number) = self.find(address)?;
        Some((self.spans.get_mut(index)?, number))
    }
}

impl Span {
    fn new(subnet: &Subnet) -> Self {
        let cidr = subnet.cidr();
        let range = subnet.range().unwrap_or(cidr);
        let start = offset(cidr.network(), range.network()).unwrap_or(0);
        let given = start..start + size(range);
        let mut taken = Space::default();
        let broadcast = cidr.is_ipv4().then(|| cidr.broadcast());
        let ends = [Some(cidr.network()), broadcast, Some(subnet.gateway())].into_iter().flatten();
        let nobodys = ends.chain(subnet.reserved().iter().copied());
        let nobodys: BTreeSet<u128> =
            nobodys.filter_map(|address| offset(cidr.network(), address)).collect();
        nobodys.iter().for_each(|number| {
            taken.take(*number);
        });
        let excluded = nobodys.range(given.clone()).count();
        Self {
            usable: (given.end - given.start) - excluded as u128,
            given,
            taken,
            nobodys,
            held: Held::default(),
            proposed: BTreeSet::new(),
            block: size_of_prefix(cidr, subnet.block_prefix()),
            mine: BTreeSet::new(),
            open: BTreeSet::new(),
            cursor: 0,
            subnet: subnet.clone(),
        }
    }

    fn number(&self, address: IpAddr) -> Option<u128> {
        let cidr = self.subnet.cidr();
        cidr.contains(address).then(|| offset(cidr.network(), address))?
    }

    fn address(&self, number: u128) -> IpAddr {
        address_at(self.subnet.cidr().network(), number)
    }

    /// Whether an address is given out without being asked for.
    fn gives(&self, number: u128) -> bool {
        self.given.contains(&number) && self.subnet.is_usable(self.address(number))
    }

    /// The block that begins at a number, as a range of addresses.
    fn range(&self, start: u128) -> IpNetwork {
        let first = self.address(start);
        IpNetwork::new(first, self.subnet.block_prefix()).unwrap_or_else(|_| IpNetwork::from(first))
    }

    /// What is given out of the block that begins at a number.
    fn within(&self, start: u128) -> Range<u128> {
        start.max(self.given.start)..(start + self.block).min(self.given.end)
    }

    fn take(&mut self, number: u128) {
        self.taken.take(number);
    }

    fn free(&mut self, number: u128) {
        // What nobody gets stays taken.
        if self.subnet.is_usable(self.address(number)) && self.taken.free(number) {
            let start = number - number % self.block;
            if self.mine.contains(&start) {
                self.open.insert(start);
            }
        }
    }

    /// Counts that a number has another holder than before.
    fn tally(&mut self, number: u128, before: Option<Holder>, now: Option<Holder>) {
        if !self.gives(number) {
            return;
        }
        if let Some(before) = before {
            *self.held.of(before) -= 1;
        }
        if let Some(now) = now {
            *self.held.of(now) += 1;
        }
    }

    fn count(&self) -> Count {
        let Held { endpoints, services, resting } = self.held;
        Count { usable: self.usable, endpoints, services, resting, reserved: 0 }
    }

    fn add_block(&mut self, start: u128) {
        self.mine.insert(start);
        self.open.insert(start);
    }

    /// Whether nobody has anything of the block that begins at a number.
    fn is_empty_block(&self, start: u128) -> bool {
        self.held_in_block(start) == 0 && self.taken.next_free(self.within(start)).is_some()
    }

    /// Whether nobody has anything of a number's block but the number itself.
    fn is_empty_block_but(&self, number: u128) -> bool {
        let start = number - number % self.block;
        let within = self.within(start);
        self.held_in_block(start) == self.taken.taken(number..number + 1)
            && (within.contains(&number) || self.taken.next_free(within).is_some())
    }

    /// How many addresses of the block that begins at a number somebody has.
    fn held_in_block(&self, start: u128) -> u128 {
        let all = start..start + self.block;
        let nobodys = self.nobodys.range(all.clone()).count();
        self.taken.taken(all) - nobodys as u128
    }

    /// How many addresses of the block that begins at a number may be given out and nobody has.
    fn free_in_block(&self, start: u128) -> u128 {
        let within = self.within(start);
        (within.end.saturating_sub(within.start)).saturating_sub(self.taken.taken(within))
    }

    /// A free address of this node's blocks: going on behind the last one, so that an address that
    /// was freed comes late again.
    fn own_free(&mut self) -> Option<IpAddr> {
        let here = self.cursor - self.cursor % self.block;
        let mut behind = self.open.range(here..);
        let mut next = match behind.next() {
            Some(start) if *start == here => {
                let within = self.within(here);
                match self.taken.next_free(self.cursor.max(within.start)..within.end) {
                    Some(number) => return Some(self.give(number)),
                    None => behind.next().copied(),
                }
            }
            other => other.copied(),
        };
        loop {
            let start = next.or_else(|| self.open.first().copied())?;
            if let Some(number) = self.taken.next_free(self.within(start)) {
                return Some(self.give(number));
            }
            // It is full, which is looked up once only.
            self.open.remove(&start);
            next = self.open.range(here + 1..).next().copied();
        }
    }

    fn give(&mut self, number: u128) -> IpAddr {
        self.take(number);
        self.proposed.insert(number);
        self.cursor = number + 1;
        self.address(number)
    }
}

/// How far an address is behind another of its family.
fn offset(first: IpAddr, address: IpAddr) -> Option<u128> {
    match (first, address) {
        (IpAddr::V4(first), IpAddr::V4(address)) => {
            Some(u128::from(u32::from(address).checked_sub(first.into())?))
        }
        (IpAddr::V6(first), IpAddr::V6(address)) => u128::from(address).checked_sub(first.into()),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => None,
    }
}

fn size(range: IpNetwork) -> u128 {
    size_of_prefix(range, range.prefix())
}

/// How many addresses a range with this prefix length has. A subnet's is at least 8 for IPv4 and
/// 16 for IPv6, so this does not overflow.
fn size_of_prefix(like: IpNetwork, prefix: u8) -> u128 {
    let host_bits = u32::from(width(like.network()).saturating_sub(prefix));
    1u128.checked_shl(host_bits).unwrap_or(u128::MAX)
}

#[cfg(test)]
mod tests;
