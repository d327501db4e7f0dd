//! What follows from what servers say.

use super::*;
use crate::registry::tests::read;

/// A registry with a cluster of these servers.
fn registry(servers: &[&str]) -> Snapshot {
    read(&format!(
        "[[cluster]]\nname = \"eu\"\nendpoints = {servers:?}\ntls = {{ mode = \"require\" }}\n\
         [[tenant]]\nid = \"acme\"\n[tenant.placement]\ncluster = \"eu\"\ndbname = \"acme\"\n\
         [tenant.lease]\nroles = {{ read-write = \"acme-rw\" }}\n"
    ))
}

fn cluster(servers: &[&str]) -> Arc<Cluster> {
    Arc::clone(registry(servers).cluster("eu").expect("a cluster"))
}

fn host(text: &str) -> Host {
    Host::read(text).expect("a server")
}

fn primary(timeline: u32) -> Standing {
    Standing::Primary(Timeline(timeline))
}

fn state_of(cluster: &Arc<Cluster>) -> (Clusters, Arc<ClusterState>) {
    let clusters = Clusters::new();
    let state = clusters.of(cluster).expect("of several");
    assert!(Arc::ptr_eq(&state, &clusters.of(cluster).expect("of several")));
    (clusters, state)
}

#[test]
fn a_server_alone_is_not_asked_what_it_is() {
    assert!(Clusters::new().of(&cluster(&["db1"])).is_none());
}

#[test]
fn the_highest_timeline_is_the_primarys_and_the_reign_before_is_over() {
    let cluster = cluster(&["db1", "db2", "db3"]);
    let (clusters, state) = state_of(&cluster);
    let mut failovers = clusters.failovers();
    assert_eq!(state.order(&cluster, Wanted::Primary), [0, 1, 2]);
    let first = state.saw(&host("db2"), primary(4)).expect("the primary").expect("a primary");
    assert!(state.saw(&host("db1"), Standing::Standby).expect("a standby").is_none());
    assert_eq!(state.order(&cluster, Wanted::Primary), [1, 2, 0]);
    let until = state.until_failover();
    assert!(!first.is_over() && !until.is_cancelled() && !failovers.has_changed().unwrap());

    let second = state.saw(&host("db1"), primary(5)).expect("the primary").expect("a primary");
    assert!(first.is_over() && !second.is_over());
    assert!(until.is_cancelled() && !state.until_failover().is_cancelled());
    assert!(failovers.has_changed().unwrap());
    failovers.mark_unchanged();
    assert_eq!(state.order(&cluster, Wanted::Primary)[0], 0);

    // The one before lives on.
    let overtaken = state.saw(&host("db2"), primary(4)).expect_err("another was promoted");
    assert_eq!(overtaken, Overtaken { newest: Timeline(5) });
    assert_eq!(state.order(&cluster, Wanted::Primary), [0, 2, 1]);
    assert!(!second.is_over() && !failovers.has_changed().unwrap());
    // It follows the new one, and is promoted once more.
    state.saw(&host("db2"), Standing::Standby).expect("a standby");
    state.saw(&host("db2"), primary(6)).expect("the primary");
    assert!(second.is_over() && failovers.has_changed().unwrap());
    assert_eq!(state.order(&cluster, Wanted::Primary)[0], 1);
}

#[test]
fn who_only_reads_goes_to_standbys_in_turn() {
    let cluster = cluster(&["db1", "db2", "db3"]);
    let (_clusters, state) = state_of(&cluster);
    let firsts = |state: &ClusterState| -> HashSet<usize> {
        (0..6).map(|_| state.order(&cluster, Wanted::Standby)[0]).collect()
    };
    let (one, other) = (host("db2"), host("db3"));
    state.saw(&host("db1"), primary(4)).expect("the primary");
    for standby in [&one, &other] {
        state.saw(standby, Standing::Standby).expect("a standby");
    }
    assert_eq!(firsts(&state), HashSet::from([0]), "nobody watches");
    assert!(state.standby(&one, Timeline(4)).is_none());
    state.watched_since();
    assert_eq!(firsts(&state), HashSet::from([1, 2]));
    assert_eq!(state.order(&cluster, Wanted::Standby)[2], 0, "the primary if there is no other");
    assert_eq!(state.order(&cluster, Wanted::Primary)[0], 0);
    state.was_no_use(&one);
    assert_eq!(firsts(&state), HashSet::from([2]));

    // One that follows a primary of before reads what is lost.
    assert!(state.standby(&other, Timeline(3)).is_none());
    let reign = state.standby(&other, Timeline(4)).expect("it follows the primary");
    assert!(!reign.is_over());
    state.saw(&one, primary(5)).expect("the primary");
    assert!(reign.is_over() && state.standby(&other, Timeline(4)).is_none());
    state.saw(&other, Standing::Standby).expect("a standby");
    assert!(state.standby(&other, Timeline(5)).is_some());
    state.saw_nothing(&other);
    assert!(!state.may_read(&other) && firsts(&state) == HashSet::from([1]));
}

#[test]
fn two_on_one_timeline_are_one_primary_for_as_long_as_it_answers() {
    let cluster = cluster(&["vip", "db1"]);
    let (clusters, state) = state_of(&cluster);
    let reign = state.saw(&host("vip"), primary(1)).expect("the primary").expect("a primary");
    state.saw(&host("db1"), primary(1)).expect_err("another is the primary");
    assert_eq!(state.order(&cluster, Wanted::Primary)[0], 0);
    state.saw_nothing(&host("vip"));
    state.saw(&host("db1"), primary(1)).expect("the primary");
    assert_eq!(state.order(&cluster, Wanted::Primary)[0], 1);
    assert!(!reign.is_over() && !clusters.failovers().has_changed().unwrap());
}

#[test]
fn openbaos_connection_is_made_anew_once_for_each_tenant_after_a_failover() {
    let cluster = cluster(&["db1", "db2"]);
    let (_clusters, state) = state_of(&cluster);
    let [acme, globex] = ["acme", "globex"].map(|id| TenantId::parse(id).expect("an id"));
    state.saw(&host("db1"), primary(1)).expect("the primary");
    assert!(state.reconnected(&acme).is_none());
    state.saw(&host("db2"), primary(2)).expect("the primary");
    let is_told = |tenant| state.reconnected(tenant).expect("a failover").initialized();
    for tenant in [&acme, &globex] {
        assert!(!is_told(tenant));
        state.reconnected(tenant).expect("a failover").set(()).expect("told once");
        assert!(is_told(tenant));
    }
    state.was_stuck(&acme);
    assert!(!is_told(&acme) && is_told(&globex));
}

#[test]
fn a_cluster_of_other_servers_is_another() {
    let before = cluster(&["db1", "db2"]);
    let (clusters, state) = state_of(&before);
    let reign = state.saw(&host("db2"), primary(7)).expect("the primary").expect("a primary");
    // One more is the same cluster still; the same again says nothing.
    clusters.follow(&registry(&["db1", "db2", "db3"]));
    clusters.follow(&registry(&["db1", "db2", "db3"]));
    state.saw(&host("db3"), primary(1)).expect_err("overtaken");
    assert!(!reign.is_over() && !state.until_failover().is_cancelled());

    let until = state.until_failover();
    let mut failovers = clusters.failovers();
    failovers.mark_unchanged();
    clusters.follow(&registry(&["new1", "new2"]));
    assert!(reign.is_over() && until.is_cancelled() && failovers.has_changed().unwrap());
    // Whoever still looks at the servers before tells nothing of the cluster.
    state.saw(&host("db2"), primary(7)).expect_err("it is none of the cluster's");
    state.saw_nothing(&host("db1"));
    let reign = state.saw(&host("new1"), primary(1)).expect("the primary").expect("a primary");
    assert!(!reign.is_over());
}

#[test]
fn sessions_go_on_at_the_server_that_stays_alone() {
    let (clusters, state) = state_of(&cluster(&["db1", "db2"]));
    let left = state.saw(&host("db1"), primary(1)).expect("the primary").expect("a primary");
    let stays = state.saw(&host("db2"), primary(2)).expect("the primary").expect("a primary");
    assert!(state.watched_since().1 && !state.ends_watch(Duration::ZERO));
    clusters.follow(&registry(&["db2"]));
    assert!(left.is_over() && !stays.is_over());
    assert!(state.ends_watch(Duration::from_secs(60)), "nobody looks at it any more");
    state.saw(&host("db1"), primary(3)).expect_err("it is none of the cluster's");
    assert!(!stays.is_over());
    // It gets a standby once more, which is promoted.
    let several = registry(&["db2", "db3"]);
    clusters.follow(&several);
    let state = clusters.of(several.cluster("eu").expect("a cluster")).expect("of several");
    state.saw(&host("db3"), primary(3)).expect("the primary");
    assert!(stays.is_over(), "it is told by the same state");
}

#[test]
fn a_session_from_before_the_first_standby_leaves_with_the_first_failover() {
    let several = cluster(&["db1", "db2"]);
    let (clusters, state) = state_of(&several);
    state.saw(&host("db1"), primary(1)).expect("the primary");
    assert!(!clusters.may_have_left(&several));
    state.saw(&host("db2"), primary(2)).expect("the primary");
    assert!(clusters.may_have_left(&several));
    clusters.follow(&registry(&["db2"]));
    assert!(!clusters.may_have_left(&several), "it is alone");
}

#[test]
fn what_a_server_said_that_was_no_good_goes_with_it() {
    let (clusters, state) = state_of(&cluster(&["db1", "db2", "liar"]));
    state.saw(&host("db1"), primary(3)).expect("the primary");
    state.saw(&host("liar"), primary(u32::MAX)).expect("it is believed");
    state.saw(&host("db1"), primary(3)).expect_err("overtaken");
    clusters.follow(&registry(&["db1", "db2"]));
    state.saw(&host("db1"), primary(3)).expect("the primary again");
    state.saw(&host("db2"), primary(2)).expect_err("overtaken still");
}

#[test]
fn the_first_look_is_no_failover() {
    let (clusters, state) = state_of(&cluster(&["db1", "db2"]));
    assert!(state.watched_since().1);
    let until = state.until_failover();
    let early = state.saw(&host("db1"), primary(1)).expect("the primary").expect("a primary");
    state.saw(&host("db2"), primary(2)).expect("the primary");
    assert!(
        !until.is_cancelled() && state.reconnected(&TenantId::parse("acme").unwrap()).is_none()
    );
    // Whoever was let in meanwhile leaves all the same.
    assert!(early.is_over() && clusters.failovers().borrow().eq(&1));
}

#[test]
fn what_nobody_asks_for_is_not_watched_once_no_session_is_there() {
    let (clusters, state) = state_of(&cluster(&["db1", "db2"]));
    let (since, is_new) = state.watched_since();
    assert!(is_new && state.watched_since() == (since, false));
    let reign = state.saw(&host("db1"), primary(3)).expect("the primary");
    assert!(!state.ends_watch(Duration::ZERO), "a session is there");
    drop(reign);
    assert!(!state.ends_watch(Duration::from_secs(60)), "it was asked for");
    assert!(state.ends_watch(Duration::ZERO));
    // Its timelines are known still.
    let again = clusters.of(&cluster(&["db1", "db2"])).expect("of several");
    assert!(again.watched_since().1);
    again.saw(&host("db2"), primary(2)).expect_err("overtaken");
}

#[tokio::test]
async fn the_first_look_ends_when_each_server_was_looked_at() {
    use futures_util::FutureExt;
    let (_clusters, state) = state_of(&cluster(&["db1", "db2", "db3"]));
    let mut looked = Box::pin(state.looked_at());
    assert!((&mut looked).now_or_never().is_none());
    state.saw(&host("db1"), primary(1)).expect("the primary");
    state.saw_nothing(&host("db3"));
    assert!((&mut looked).now_or_never().is_none(), "the other may have been promoted after it");
    state.saw_answer(&host("db2"));
    assert!((&mut looked).now_or_never().is_some());
}
